"""A token for each row of logits without the host: likeliest, or drawn by the inverse of the cumulative distribution.

One launch finds each block's greatest logit and sum of shares; another, one program a row, finds the block, then the id
in it. Shares are float64, so that a draw differs from the reference's only where a random number falls into the
rounding, about 1e-14, beside one of the vocabulary's borders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.sample import Choice, penalized, sample
from hasten.ops.table import is_invariant
from hasten.ops.triton.arrange import cdiv, dense, on, power_of_2, served
from hasten.ops.triton.borders import Survey, keeps, kept, row_top
from hasten.ops.triton.launch import dependent, go, wait

NOWHERE = tl.constexpr(2**31 - 1)
MANY = 16  # rows that make programs enough by themselves


@triton.jit(do_not_specialize=("temperatures",))
def survey_block(
    logits,
    temperatures,
    peaks,
    firsts,
    masses,
    vocabulary,
    logits_row,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    go(PDL)
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    x = tl.load(logits + row * logits_row + i, mask=i < vocabulary, other=float("-inf")).to(tl.float32)
    peak = tl.max(x, 0)
    at = row * tl.num_programs(0) + block
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    tl.store(peaks + at, tl.where(broken, float("nan"), peak))
    tl.store(firsts + at, tl.min(tl.where(x == peak, i, NOWHERE), 0))
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
        if temperature > 0.0:
            top = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)
            tl.store(masses + at, tl.sum(kept(x, temperature, top, None, None, row), 0))


@triton.jit(do_not_specialize=("temperatures",))
def weigh_block(
    logits,
    temperatures,
    peaks,
    gaps,
    leasts,
    masses,
    vocabulary,
    blocks,
    logits_row,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The sum of what the filters keep of one block, as a multiple of the row's greatest share."""
    go(PDL)
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    x = tl.load(logits + row * logits_row + i, mask=i < vocabulary, other=float("-inf")).to(tl.float32)
    share = kept(x, tl.load(temperatures + row), row_top(peaks, row, blocks, BLOCKS), gaps, leasts, row)
    tl.store(masses + row * blocks + block, tl.sum(share, 0))


@triton.jit
def first_above(masses, at, i):
    """The first i that has a share and brings the sum above `at`; the last that has one where rounding leaves none."""
    has = masses > 0.0
    first = tl.min(tl.where(has & (tl.cumsum(masses, 0) > at), i, NOWHERE), 0)
    return tl.minimum(first, tl.max(tl.where(has, i, 0), 0))


@triton.jit(do_not_specialize=("temperatures", "uniform"))
def choose_token(
    logits,
    temperatures,
    uniform,
    peaks,
    firsts,
    masses,
    gaps,
    leasts,
    out,
    vocabulary,
    blocks,
    logits_row,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    go(PDL)
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)
    wait(PDL)
    peak = tl.load(peaks + row * blocks + b, mask=b < blocks, other=float("-inf"))
    top = tl.max(peak, 0)
    broken = (tl.max((peak != peak).to(tl.int32), 0) > 0) | (tl.abs(top) == float("inf"))
    block = tl.min(tl.where(peak == top, b, blocks - 1), 0)
    token = tl.load(firsts + row * blocks + block)
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
        if (temperature > 0.0) & (broken == 0):
            mass = tl.load(masses + row * blocks + b, mask=b < blocks, other=0.0)
            if gaps is None and leasts is None:  # multiples of each block's own greatest share
                mass *= kept(peak, temperature, top, None, None, row)
            below_one = tl.full([], 1.0 - 2.0**-52, tl.float64)
            at = tl.minimum(tl.load(uniform + row), below_one) * tl.sum(mass, 0)
            block = first_above(mass, at, b)
            i = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + row * logits_row + i, mask=i < vocabulary, other=float("-inf")).to(tl.float32)
            before = tl.sum(tl.where(b < block, mass, 0.0), 0)
            token = first_above(kept(x, temperature, top, gaps, leasts, row), at - before, i)
    tl.store(out + row, tl.where(broken, -1, token.to(tl.int64)))


@dataclass(frozen=True, slots=True)
class SampleLaunch:
    block: int
    blocks: int
    warps: int


@lru_cache(1024)
def sample_launch(rows: int, vocabulary: int) -> SampleLaunch:
    """Blocks small enough that one row fills the processors, or large enough that many rows make few programs."""
    block = min(max(power_of_2(vocabulary), 128), 1024 if rows < MANY else 4096)
    return SampleLaunch(block=block, blocks=cdiv(vocabulary, block), warps=min(max(block // 256, 1), 8))


def _accepts(
    logits: Tensor, c: Choice, uniform: Tensor | None, prompts: Tensor | None, generated: Tensor | None
) -> bool:
    float32 = c.temperature is None or (c.temperature.dtype == torch.float32 and uniform is not None)
    return float32 and logits.dim() == 2 and logits.shape[1] > 0 and served(logits)


@sample.register("triton", devices="cuda", accepts=_accepts, invariant=True)
def _(logits: Tensor, c: Choice, uniform: Tensor | None, prompts: Tensor | None, generated: Tensor | None) -> Tensor:
    if is_invariant():
        logits, c = logits.float(), _filtering(c)
    logits = dense(penalized(logits.float(), c, prompts, generated) if c.penalizes else logits)
    (rows, vocabulary), device, warm = logits.shape, logits.device, c.temperature is not None
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return out
    shape = sample_launch(MANY if is_invariant() else rows, vocabulary)
    cells, fixed = rows * shape.blocks, {"BLOCK": shape.block, "num_warps": shape.warps, **dependent(device)}
    peaks = torch.empty(cells, dtype=torch.float32, device=device)
    firsts = torch.empty(cells, dtype=torch.int32, device=device)
    masses = torch.empty(cells, dtype=torch.float64, device=device) if warm else None
    row, grid = logits.stride(0), (shape.blocks, rows)
    blocks = power_of_2(shape.blocks)
    gaps = leasts = None
    with on(logits):
        # without filters one reading of the logits weighs them too
        temperatures = None if c.filters else c.temperature
        survey_block[grid](logits, temperatures, peaks, firsts, masses, vocabulary, row, **fixed)
        if c.temperature is not None and c.filters:
            gaps, leasts = keeps(Survey(logits, c.temperature, peaks, shape.block), c)
            weigh_block[grid](
                logits,
                c.temperature,
                peaks,
                gaps,
                leasts,
                masses,
                vocabulary,
                shape.blocks,
                row,
                BLOCKS=blocks,
                **fixed,
            )
        choose_token[(rows,)](
            logits,
            c.temperature,
            uniform,
            peaks,
            firsts,
            masses,
            gaps,
            leasts,
            out,
            vocabulary,
            shape.blocks,
            row,
            BLOCKS=blocks,
            **fixed,
        )
    return out


def _filtering(c: Choice) -> Choice:
    """The same choice by the launches that filters take: a row that has none must not depend on one beside it."""
    if c.temperature is None or c.filters:
        return c
    return replace(c, min_p=torch.zeros_like(c.temperature))
