"""Experts for a few tokens: each pair of a token and a chosen expert is a product of one row with that expert's matrix.

Only the chosen experts are read. Pairs that share one run side by side, so that it comes from memory once and from the
second-level cache for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.linear import Matrix
from hasten.ops.moe import experts
from hasten.ops.triton.act import CURVES, curve, gated_curve
from hasten.ops.triton.arrange import cdiv, dense, on, power_of_2, processors, served
from hasten.ops.triton.launch import dependent, go, wait
from hasten.spec import Moe

MOST_TOKENS = 64


@triton.jit
def row_product(weight, x, n, present, w_row, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(len(n),): rows n of a matrix times x, in float32."""
    total = tl.zeros((n.shape[0],), tl.float32)
    for start in tl.static_range(0, COLUMNS, BLOCK):  # unrolled: the next rows are asked for while these are summed
        k = start + tl.arange(0, BLOCK)
        inside = present[:, None] & (k < COLUMNS)[None, :]
        w = tl.load(weight + n.to(tl.int64)[:, None] * w_row + k[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(x + k, mask=k < COLUMNS, other=0.0).to(tl.float32)
        total += tl.sum(w * y[None, :], 1)
    return total


@triton.jit
def expert_up(
    x,
    which,
    weight,
    bias,
    out,
    rows,
    x_row,
    w_expert,
    w_row,
    bias_expert,
    TOP_K: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    pair = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = n < rows
    if GATED:  # rows of the gate and of up, side by side
        both = tl.reshape(n[:, None] + tl.arange(0, 2)[None, :] * rows, (2 * ROWS,))
        present = tl.reshape(tl.broadcast_to(inside[:, None], (ROWS, 2)), (2 * ROWS,))
    else:
        both, present = n, inside
    wait(PDL)
    expert = tl.load(which + pair)
    if HELD:  # nothing is read of an expert that is elsewhere
        present = present & (expert < HELD)
    y = row_product(weight + expert * w_expert, x + pair // TOP_K * x_row, both, present, w_row, COLUMNS, BLOCK)
    if bias is not None:
        y += tl.load(bias + expert * bias_expert + both, mask=present, other=0.0).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.reshape(y, (ROWS, 2)))
        y = gated_curve(gate, up, ACT)
    else:
        y = curve(y, ACT)
    tl.store(out + pair * rows + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def expert_down(
    x,
    shares,
    which,
    weight,
    bias,
    out,
    rows,
    w_expert,
    w_row,
    bias_expert,
    TOP_K: tl.constexpr,
    TOP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = n < rows
    wait(PDL)
    i = tl.arange(0, TOP)  # all choices at once: asked for one by one, each would wait for its own expert's number
    chosen = tl.load(which + token * TOP_K + i, mask=i < TOP_K, other=0)
    share = tl.load(shares + token * TOP_K + i, mask=i < TOP_K, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for j in tl.static_range(TOP_K):
        expert = tl.sum(tl.where(i == j, chosen, 0), 0)
        present = inside & (expert < HELD) if HELD else inside
        h = x + (token * TOP_K + j) * COLUMNS
        y = row_product(weight + expert * w_expert, h, n, present, w_row, COLUMNS, BLOCK)
        if bias is not None:
            y += tl.load(bias + expert * bias_expert + n, mask=present, other=0.0).to(tl.float32)
        total += y * tl.sum(tl.where(i == j, share, 0.0), 0)
    tl.store(out + token * rows + n, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class ExpertLaunch:
    rows: int  # of the matrix in a program; as many again where it is gated
    block: int  # columns of a row that are asked for at once
    warps: int


@lru_cache(1024)
def expert_launch(results: int, columns: int, itemsize: int, tiles: int, processors: int) -> ExpertLaunch:
    """16 KiB of weights at once, fewer where there would be less than eight programs a processor.

    results: of all products together. tiles: rows that belong to one of them, two where gated.
    """
    block = min(max(power_of_2(columns), 128), 4096)
    count = min(max(1, 16384 // (block * itemsize * tiles)), 32)
    while count > 1 and results < count * 8 * processors:
        count //= 2
    return ExpertLaunch(rows=count, block=block, warps=4)


def stacked(m: Matrix) -> tuple[Tensor, Tensor | None, int, int, int]:
    """A stack of experts' matrices: weights, biases, and their strides: of an expert, a row, an expert's bias."""
    w, b = dense(m.decode()), None if m.bias is None else dense(m.bias)
    return w, b, w.stride(0), w.stride(1), 0 if b is None else b.stride(0)


def known(m: Moe) -> bool:
    return m.expert.act in CURVES or (m.expert.gated and m.expert.act == "clamped_swiglu")


def _accepts(x: Tensor, shares: Tensor, which: Tensor, up: Matrix, down: Matrix, m: Moe) -> bool:
    few = len(x) <= MOST_TOKENS and which.numel() <= 2 * m.experts  # else each expert serves many pairs
    return few and known(m) and served(x, shares, up.decode(), up.bias, down.decode(), down.bias)


@experts.register("triton", devices="cuda", accepts=_accepts)
def _(x: Tensor, shares: Tensor, which: Tensor, up: Matrix, down: Matrix, m: Moe) -> Tensor:
    (tokens, width), inner, x = x.shape, m.expert.width, dense(x)
    held = 0 if m.held is None else m.here  # how many of the experts, where not all are
    h, out = x.new_empty(which.numel(), inner), x.new_empty(tokens, width)
    if not tokens:
        return out
    which, many = which.contiguous(), processors(x.device)
    w, bias, *strides = stacked(up)
    shape = expert_launch(h.numel(), width, w.element_size(), 1 + m.expert.gated, many)
    with on(x):
        expert_up[(len(h), cdiv(inner, shape.rows))](
            x,
            which,
            w,
            bias,
            h,
            inner,
            x.stride(0),
            *strides,
            TOP_K=m.top_k,
            ACT=m.expert.act,
            GATED=m.expert.gated,
            COLUMNS=width,
            ROWS=shape.rows,
            BLOCK=shape.block,
            HELD=held,
            num_warps=shape.warps,
            **dependent(x.device),
        )
        w, bias, *strides = stacked(down)
        shape = expert_launch(out.numel(), inner, w.element_size(), 1, many)
        expert_down[(tokens, cdiv(width, shape.rows))](
            h,
            shares.contiguous(),
            which,
            w,
            bias,
            out,
            width,
            *strides,
            TOP_K=m.top_k,
            TOP=power_of_2(m.top_k),
            COLUMNS=inner,
            ROWS=shape.rows,
            BLOCK=shape.block,
            HELD=held,
            num_warps=shape.warps,
            **dependent(x.device),
        )
    return out
