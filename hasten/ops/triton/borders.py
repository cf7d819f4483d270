"""The least logits that top-k and top-p keep, found digit by digit, without a sort and without asking the device.

A filter keeps a logit if what is greater, counted or weighed, is less than a limit. Logits are read as numbers of 32
bits in their own order; a launch for each digit of four bits weighs the sixteen numbers it may be, and the next launch
takes the smallest one that still is above the border. Sums are float64 and in a fixed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.sample import Choice
from hasten.ops.triton.arrange import on, power_of_2
from hasten.ops.triton.launch import dependent, go, wait

DIGITS = {torch.bfloat16: 4, torch.float16: 5, torch.float32: 8}  # of a float32 that holds one: the rest are the same


@triton.jit
def ordered(x):
    """float32 to integers from 0 to 2^32 - 1 in the same order, int64."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # of both zeros one
    return tl.where(bits < 0, -1 - bits.to(tl.int64), bits.to(tl.int64) + 2147483648)


@triton.jit
def warmed(x, temperature):
    """float32 x over its temperature, rounded as torch rounds; over one where it is 0."""
    return tl.math.div_rn(x, tl.where(temperature > 0.0, temperature, 1.0) + tl.zeros_like(x))


@triton.jit
def kept(x, temperature, top, gaps, leasts, row):
    """Shares of logits x as multiples of the greatest's, float64; 0 for those that are dropped."""
    y, greatest = warmed(x, temperature), warmed(top, temperature)
    share = tl.exp(y.to(tl.float64) - greatest.to(tl.float64))
    if gaps is not None:
        share = tl.where(y < greatest + tl.load(gaps + row), 0.0, share)
    if leasts is not None:
        share = tl.where(ordered(x) < tl.load(leasts + row), 0.0, share)
    return share


@triton.jit
def row_top(peaks, row, blocks, BLOCKS: tl.constexpr):
    """The greatest of a row's blocks; 0 if that is not finite, and the row has no token."""
    b = tl.arange(0, BLOCKS)
    top = tl.max(tl.load(peaks + row * blocks + b, mask=b < blocks, other=float("-inf")), 0)
    return tl.where(tl.abs(top) < float("inf"), top, 0.0)


@triton.jit
def digit_weights(weights, row, blocks, BLOCKS: tl.constexpr):
    """The weights of a row's sixteen digits, all blocks together."""
    b, d = tl.arange(0, BLOCKS), tl.arange(0, 16)
    at = weights + (row * blocks + b)[:, None] * 16 + d[None, :]
    return tl.sum(tl.load(at, mask=(b < blocks)[:, None], other=0.0), 0)


@triton.jit
def narrowed(w, prefix, above, limit):
    """The digit behind `prefix`, and the weight above both: the smallest digit with less than `limit` above."""
    d = tl.arange(0, 16)
    over = above + tl.sum(tl.where(d[None, :] > d[:, None], w[None, :], 0.0), 1)
    digit = tl.min(tl.where(over < limit, d, 15), 0)
    return prefix * 16 + digit, tl.sum(tl.where(d == digit, over, 0.0), 0)


@triton.jit(do_not_specialize=("temperatures", "limits", "rows", "step"))
def weigh_digit(
    logits,
    temperatures,
    peaks,
    gaps,
    leasts,
    limits,
    weights,
    state,
    borders,
    rows,
    vocabulary,
    blocks,
    logits_row,
    step,
    DIGITS: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Digit `step` of each row's border: weigh what it may be, in one block; behind the last, write the border down.

    limits: what may be above; of MASS a share of the row's own. state (DIGITS, 3, rows): prefix, weight above, limit.
    """
    go(PDL)
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wait(PDL)
    prefix, above, limit = tl.full([], 0, tl.int64), tl.full([], 0.0, tl.float64), tl.load(limits + row)
    before = state + (step - 1) * 3 * rows + row
    if step > 1:
        prefix, above, limit = tl.load(before).to(tl.int64), tl.load(before + rows), tl.load(before + 2 * rows)
    if step > 0:
        last = weights + (step - 1) * rows * blocks * 16
        w = digit_weights(last, row, blocks, BLOCKS)
        if MASS:
            limit *= tl.where(step == 1, tl.sum(w, 0), 1.0)
        prefix, above = narrowed(w, prefix, above, limit)
        if (step < DIGITS) & (block == 0):
            tl.store(before + 3 * rows, prefix.to(tl.float64))
            tl.store(before + 4 * rows, above)
            tl.store(before + 5 * rows, limit)
    if step == DIGITS:
        tl.store(borders + row, prefix << (32 - 4 * DIGITS))
    else:
        temperature, top = tl.load(temperatures + row), row_top(peaks, row, blocks, BLOCKS)
        d = tl.arange(0, 16)
        found = tl.zeros((16, CHUNK), tl.float64)
        for start in range(0, BLOCK, CHUNK):
            i = block * BLOCK + start + tl.arange(0, CHUNK)
            x = tl.load(logits + row * logits_row + i, mask=i < vocabulary, other=float("-inf")).to(tl.float32)
            key = ordered(x)
            if MASS:
                weight = kept(x, temperature, top, gaps, leasts, row)
            else:
                weight = tl.where(i < vocabulary, 1.0, 0.0).to(tl.float64)
            own = (key >> (28 - 4 * step)) == prefix * 16 + d[:, None]
            found += tl.where(own, weight[None, :], 0.0)
        at = ((step * rows + row) * blocks + block) * 16
        tl.store(weights + at + d, tl.sum(found, 1))


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """Logits (rows, vocabulary), the greatest of each of their blocks (rows * blocks,), and each row's temperature."""

    logits: Tensor
    temperatures: Tensor
    peaks: Tensor
    block: int

    @property
    def blocks(self) -> int:
        return len(self.peaks) // len(self.logits)


def keeps(s: Survey, c: Choice) -> tuple[Tensor | None, Tensor | None]:
    """What the filters keep of a row: y of at least greatest + gap, float32, and logits `ordered` from a border on."""
    gaps, least = None if c.min_p is None else c.min_p.log(), None
    if c.top_k is not None:
        least = _border(s, torch.where(c.top_k > 0, c.top_k, math.inf).double(), None, None, mass=False)
    if c.top_p is not None:
        nucleus = _border(s, torch.where(c.top_p < 1, c.top_p, math.inf).double(), gaps, least, mass=True)
        least = nucleus if least is None else least.maximum(nucleus)
    return gaps, least


def _border(s: Survey, limits: Tensor, gaps: Tensor | None, leasts: Tensor | None, *, mass: bool) -> Tensor:
    """The least that has less than a limit above: of a count, or of the mass that gaps and leasts leave."""
    (rows, vocabulary), digits = s.logits.shape, DIGITS[s.logits.dtype]
    weights = limits.new_empty(digits * rows * s.blocks * 16)
    state, borders = limits.new_empty(digits, 3, rows), torch.empty(rows, dtype=torch.int64, device=limits.device)
    chunk = min(s.block, 512)
    with on(s.logits):
        for step in range(digits + 1):
            weigh_digit[(s.blocks if step < digits else 1, rows)](
                s.logits,
                s.temperatures,
                s.peaks,
                gaps,
                leasts,
                limits,
                weights,
                state,
                borders,
                rows,
                vocabulary,
                s.blocks,
                s.logits.stride(0),
                step,
                DIGITS=digits,
                MASS=mass,
                BLOCK=s.block,
                CHUNK=chunk,
                BLOCKS=power_of_2(s.blocks),
                num_warps=max(chunk // 32, 1),
                **dependent(s.logits.device),
            )
    return borders
