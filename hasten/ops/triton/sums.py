"""The second half of a split product: sums added up, and the rest of the region `project`, a row a program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.norm import NormLayer
from hasten.ops.triton.arrange import dense, on, power_of_2
from hasten.ops.triton.launch import dependent, go, wait
from hasten.ops.triton.norm import normalized
from hasten.ops.triton.settle import vectors


@triton.jit(do_not_specialize=("rows",))
def settle_sums(
    sums,
    bias,
    residual,
    inner_weight,
    inner_bias,
    outer_weight,
    outer_bias,
    layer_scale,
    then_weight,
    then_bias,
    out,
    normed,
    rows,
    width,
    residual_row,
    scale,
    inner_eps,
    inner_offset,
    outer_eps,
    outer_offset,
    then_eps,
    then_offset,
    INNER: tl.constexpr,
    INNER_WIDE: tl.constexpr,
    OUTER: tl.constexpr,
    OUTER_WIDE: tl.constexpr,
    THEN: tl.constexpr,
    THEN_WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = (i < width)[None, :]
    own = i < width  # what every row shares is read before the sums are there
    if inner_weight is not None:
        w = tl.load(inner_weight + i, mask=own, other=0.0)[None, :]
    b = None
    if inner_bias is not None:
        b = tl.load(inner_bias + i, mask=own, other=0.0)[None, :]
    if outer_weight is not None:
        g = tl.load(outer_weight + i, mask=own, other=0.0)[None, :]
    c = None
    if outer_bias is not None:
        c = tl.load(outer_bias + i, mask=own, other=0.0)[None, :]
    if then_weight is not None:
        h = tl.load(then_weight + i, mask=own, other=0.0)[None, :]
    d = None
    if then_bias is not None:
        d = tl.load(then_bias + i, mask=own, other=0.0)[None, :]
    y = tl.zeros((1, BLOCK), tl.float32)
    if bias is not None:
        y += tl.load(bias + i, mask=own, other=0.0).to(tl.float32)[None, :]
    wait(PDL)
    for split in tl.static_range(SPLITS):
        y += tl.load(sums + (split * rows + row) * width + i[None, :], mask=inside, other=0.0)
    if INNER != "none":
        y = normalized(y, inside, w, b, width, inner_eps, inner_offset, INNER, INNER_WIDE, out.dtype.element_ty)
    if layer_scale is not None:
        y *= tl.load(layer_scale + i, mask=own, other=0.0).to(tl.float32)[None, :]
    beside = residual + row * residual_row + i[None, :]
    y = y * scale + tl.load(beside, mask=inside, other=0.0).to(tl.float32)
    if OUTER != "none":
        y = normalized(y, inside, g, c, width, outer_eps, outer_offset, OUTER, OUTER_WIDE, out.dtype.element_ty)
    y = y.to(out.dtype.element_ty)
    tl.store(out + row * width + i[None, :], y, mask=inside)
    if THEN != "none":
        z = normalized(y.to(tl.float32), inside, h, d, width, then_eps, then_offset, THEN, THEN_WIDE, y.dtype)
        tl.store(normed + row * width + i[None, :], z.to(y.dtype), mask=inside)


@dataclass(frozen=True, slots=True)
class SumsLaunch:
    block: int
    warps: int


@lru_cache(1024)
def sums_launch(width: int) -> SumsLaunch:
    """Four to sixteen numbers a thread: rows are few, so it is the wait for memory that counts."""
    block = power_of_2(width)
    return SumsLaunch(block=block, warps=min(max(block // 128, 1), 16))


def add_up(
    sums: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
    then: NormLayer | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `project_normed` does behind its product, of float32 sums (splits, rows, width).

    Both answers have residual's dtype and shape; the second is None without `then`.
    """
    splits, rows, width = sums.shape
    beside, out = dense(residual).flatten(0, -2), residual.new_empty(residual.shape)
    normed = None if then is None else torch.empty_like(out)
    norms = (inner, outer, then)
    shape = sums_launch(width)

    with on(sums):
        settle_sums[(rows,)](
            sums,
            bias,
            beside,
            *vectors(inner),
            *vectors(outer),
            layer_scale,
            *vectors(then),
            out,
            normed,
            rows,
            width,
            beside.stride(0),
            scale,
            *(e for n in norms for e in ((0.0, 0.0) if n is None else (n.spec.eps, n.spec.offset))),
            INNER="none" if inner is None else inner.spec.kind,
            INNER_WIDE=inner is not None and inner.spec.wide,
            OUTER="none" if outer is None else outer.spec.kind,
            OUTER_WIDE=outer is not None and outer.spec.wide,
            THEN="none" if then is None else then.spec.kind,
            THEN_WIDE=then is not None and then.spec.wide,
            SPLITS=splits,
            BLOCK=shape.block,
            num_warps=shape.warps,
            **dependent(sums.device),
        )
    return out, normed
