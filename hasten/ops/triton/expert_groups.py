"""Experts for many tokens: pairs of a token and a chosen expert in groups of one expert, each a product of matrices.

The host never learns how many pairs an expert has. It launches as many tiles as there can be, and a tile finds its
expert by the groups' sizes, or ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.linear import Matrix
from hasten.ops.moe import experts
from hasten.ops.triton.act import curve, gated_curve
from hasten.ops.triton.arrange import cdiv, dense, interpreted, on, power_of_2, served
from hasten.ops.triton.experts import known, stacked
from hasten.ops.triton.launch import dependent, go, wait
from hasten.spec import Moe


@triton.jit(do_not_specialize=("pairs",))
def group_pairs(which, order, ends, pairs, TWO: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """Program e: the pairs that chose expert e, in order, behind those of the experts before it; and where they end.

    TWO: whether pairs are an even number, so that two of them are read at once.
    """
    go(PDL)
    expert = tl.program_id(0)
    wait(PDL)
    before = 0
    for start in range(0, pairs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        chosen = tl.load(which + i, mask=tl.max_constancy(i < pairs, 2 if TWO else 1), other=expert)
        before += tl.sum((chosen < expert).to(tl.int32), 0)
    end = before
    for start in range(0, pairs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mine = tl.load(which + i, mask=tl.max_constancy(i < pairs, 2 if TWO else 1), other=-1) == expert
        rank = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(order + end + rank - 1, i, mask=mine)
        end += tl.sum(mine.to(tl.int32), 0)
    tl.store(ends + expert, end)


@triton.jit
def multiply_group(
    x,
    order,
    ends,
    weight,
    bias,
    shares,
    out,
    experts,
    rows,
    columns,
    x_row,
    w_expert,
    w_row,
    bias_expert,
    SHARING: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of the matrix times the pairs of one tile; SHARING pairs read one row of x."""
    go(PDL)
    wait(PDL)
    e = tl.arange(0, EXPERTS)
    stop = tl.load(ends + e, mask=e < experts, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
    tiles = tl.cdiv(stop - start, TILE)
    last = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    expert = tl.sum(((last <= tile) & (e < experts)).to(tl.int32), 0)
    if expert == experts:
        return
    own = e == expert
    first = tl.sum(tl.where(own, start + (tile - last + tiles) * TILE, 0), 0)
    place = first + tl.arange(0, TILE)
    present = place < tl.sum(tl.where(own, stop, 0), 0)
    pair = tl.load(order + place, mask=present, other=0).to(tl.int64)

    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = n < rows
    matrix = weight + expert.to(tl.int64) * w_expert + n.to(tl.int64)[:, None] * w_row
    left = x + (pair // SHARING * x_row)[:, None]
    y = tl.zeros((TILE, ROWS), tl.float32)
    up = tl.zeros((TILE, ROWS), tl.float32)
    for at in range(0, columns, BLOCK):
        k = (at + tl.arange(0, BLOCK))[None, :]
        z = tl.load(left + k, mask=present[:, None] & (k < columns), other=0.0).to(DOT)
        w = tl.load(matrix + k, mask=inside[:, None] & (k < columns), other=0.0).to(DOT)
        y = tl.dot(z, tl.trans(w), y, input_precision="ieee")
        if GATED:
            w = tl.load(matrix + rows.to(tl.int64) * w_row + k, inside[:, None] & (k < columns), 0.0).to(DOT)
            up = tl.dot(z, tl.trans(w), up, input_precision="ieee")
    if bias is not None:
        own_bias = bias + expert * bias_expert + n
        y += tl.load(own_bias, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(own_bias + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        y = gated_curve(y, up, ACT)
    elif ACT != "none":
        y = curve(y, ACT)
    if shares is not None:
        y *= tl.load(shares + pair, mask=present, other=0.0).to(tl.float32)[:, None]
    tl.store(out + pair[:, None] * rows + n[None, :], y.to(out.dtype.element_ty), present[:, None] & inside[None, :])


@dataclass(frozen=True, slots=True)
class GroupLaunch:
    tile: int  # pairs
    rows: int  # of the matrix; as many again where it is gated
    block: int  # columns in a step
    warps: int
    stages: int


@lru_cache(1024)
def group_launch(pairs: int, experts: int, itemsize: int, gated: bool) -> GroupLaunch:
    """Tiles about as large as an expert's share of the pairs, so that few rows are empty."""
    wide = itemsize > 2
    tile = min(max(power_of_2(cdiv(pairs, experts)), 16), 32 if wide else 128)
    rows = 32 if wide else 64 if gated else 128
    return GroupLaunch(tile=tile, rows=rows, block=32 if wide else 64, warps=8 if tile > 64 else 4, stages=3)


def most_tiles(pairs: int, experts: int, tile: int) -> int:
    """However the pairs are shared out: whole tiles, and one begun for each expert that has any."""
    return pairs // tile + min(experts, pairs)


def _accepts(x: Tensor, shares: Tensor, which: Tensor, up: Matrix, down: Matrix, m: Moe) -> bool:
    w, v = up.decode(), down.decode()
    return known(m) and x.dtype == w.dtype == v.dtype and served(x, shares, w, up.bias, v, down.bias)


@experts.register("triton", devices="cuda", accepts=_accepts)
def _(x: Tensor, shares: Tensor, which: Tensor, up: Matrix, down: Matrix, m: Moe) -> Tensor:
    (tokens, width), pairs = x.shape, which.numel()
    if not tokens:
        return torch.empty_like(x)
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    ends = torch.empty(m.here, dtype=torch.int32, device=x.device)
    block = min(max(power_of_2(pairs), 128), 2048)
    with on(x):
        group_pairs[(m.here,)](
            which.contiguous(),
            order,
            ends,
            pairs,
            TWO=m.top_k % 2 == 0,
            BLOCK=block,
            num_warps=block // 128,
            **dependent(x.device),
        )
    h = _multiplied(dense(x), order, ends, up, None, m.expert.width, m, sharing=m.top_k)
    y = _multiplied(h, order, ends, down, shares.contiguous(), width, m, sharing=1)
    return y.view(tokens, m.top_k, width).sum(1)  # in float32, and in order


def _multiplied(
    x: Tensor, order: Tensor, ends: Tensor, m: Matrix, shares: Tensor | None, rows: int, moe: Moe, *, sharing: int
) -> Tensor:
    """(pairs, rows): each pair's row of x through its expert's matrix, activated, or times its share where given."""
    (w, bias, *strides), pairs, gated = stacked(m), len(order), shares is None and moe.expert.gated
    # pairs of experts elsewhere stay as they are: nobody reads them on their way, and they add nothing
    out = x.new_empty(pairs, rows) if shares is None or moe.held is None else x.new_zeros(pairs, rows)
    shape = group_launch(pairs, moe.here, x.element_size(), gated)
    with on(x):
        multiply_group[(most_tiles(pairs, moe.here, shape.tile), cdiv(rows, shape.rows))](
            x,
            order,
            ends,
            w,
            bias,
            shares,
            out,
            moe.here,
            rows,
            x.shape[1],
            x.stride(0),
            *strides,
            SHARING=sharing,
            ACT=moe.expert.act if shares is None else "none",
            GATED=gated,
            TILE=shape.tile,
            ROWS=shape.rows,
            BLOCK=shape.block,
            EXPERTS=power_of_2(moe.here),
            DOT=_operands(x.dtype),
            num_warps=shape.warps,
            num_stages=shape.stages,
            **dependent(x.device),
        )
    return out


def _operands(dtype: torch.dtype) -> tl.dtype:
    """What the matrix products take: the interpreter multiplies bfloat16 wrongly."""
    known = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return tl.float32 if interpreted() else known[dtype]
