"""Normalisation of rows that fit into one program's registers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.norm import NormLayer, norm
from hasten.ops.table import is_invariant
from hasten.ops.triton.arrange import cdiv, on, power_of_2, processors, rows, served
from hasten.ops.triton.launch import dependent, go, wait

WIDEST = 16384  # 16 values in each of 1,024 threads; twice as many spill in float32


@triton.jit
def normalized(y, inside, w, b, width, eps, offset, KIND: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of float32 y, zero outside, normalised, times offset + w, plus b where there is one: in float32.

    Root-mean-square norms that are not WIDE round both factors to DTYPE before they meet, as transformers does.
    """
    if KIND == "layer":
        y = tl.where(inside, y - (tl.sum(y, 1) / width)[:, None], 0.0)
    y = y * tl.math.rsqrt(tl.sum(y * y, 1) / width + eps)[:, None]
    if KIND == "layer" or WIDE:
        y = y * (offset + w.to(tl.float32))
    else:
        w = (offset + w.to(DTYPE).to(tl.float32)).to(DTYPE)
        y = y.to(DTYPE).to(tl.float32) * w.to(tl.float32)
    if b is not None:
        y += b.to(tl.float32)
    return y


@triton.jit(do_not_specialize=("count", "inner"))
def norm_rows(
    x,
    weight,
    bias,
    out,
    count,
    inner,
    width,
    x_outer,
    x_inner,
    w_row,
    b_row,
    eps,
    offset,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (i < width)[None, :]
    lane = row % inner
    w = tl.load(weight + (lane * w_row)[:, None] + i[None, :], mask=inside, other=0.0)
    b = None
    if bias is not None:
        b = tl.load(bias + (lane * b_row)[:, None] + i[None, :], mask=inside, other=0.0)
    start = (row // inner).to(tl.int64) * x_outer + lane.to(tl.int64) * x_inner
    wait(PDL)
    y = tl.load(x + start[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
    y = normalized(y, inside, w, b, width, eps, offset, KIND, WIDE, out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * width + i[None, :], y.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class NormLaunch:
    rows: int
    block: int
    warps: int


@lru_cache(1024)
def norm_launch(width: int, count: int, processors: int) -> NormLaunch:
    """At least 2,048 elements a program and 16 a thread: two 16-byte loads in flight for 16-bit numbers.

    Where `count` rows are few, the wait for memory counts: a row a program, and one such load a thread. Where a row's
    answer must not depend on the others, they are always few: how many threads add a row up decides how it is rounded.
    """
    block = power_of_2(width)
    if count <= 4 * processors:
        count = max(1, 256 // block)
        return NormLaunch(rows=count, block=block, warps=min(count * block // 256, 32))
    count = max(1, 2048 // block)
    return NormLaunch(rows=count, block=block, warps=min(count * block // 512, 32))


def _accepts(x: Tensor, n: NormLayer) -> bool:
    shapes = (x.shape[-1:], x.shape[-2:])
    fits = all(t is None or t.shape in shapes for t in (n.weight, n.bias))
    return fits and 0 < x.shape[-1] <= WIDEST and served(x, n.weight, n.bias)


@norm.register("triton", devices="cuda", accepts=_accepts, invariant=True)
def _(x: Tensor, n: NormLayer) -> Tensor:
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    s, three = n.spec, rows(x)
    outer, inner, width = three.shape
    # one row of weights for all, or one for each place on the inner axis
    weight, bias = (None if t is None else t.contiguous().view(-1, width) for t in (n.weight, n.bias))
    strides = [width if t is not None and len(t) == inner > 1 else 0 for t in (weight, bias)]
    shape = norm_launch(width, 1 if is_invariant() else outer * inner, processors(x.device))
    with on(x):
        norm_rows[(cdiv(outer * inner, shape.rows),)](
            three,
            weight,
            bias if s.kind == "layer" else None,
            out,
            outer * inner,
            inner,
            width,
            three.stride(0) if outer > 1 else 0,  # any other number may or may not be a multiple of sixteen
            three.stride(1),
            *strides,
            s.eps,
            s.offset,
            KIND=s.kind,
            WIDE=s.wide,
            ROWS=shape.rows,
            BLOCK=shape.block,
            num_warps=shape.warps,
            **dependent(x.device),
        )
    return out
