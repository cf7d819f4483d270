"""What follows a sublayer's last matrix, in one pass over rows that fit into one program's registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.norm import NormLayer
from hasten.ops.settle import settle
from hasten.ops.table import is_invariant
from hasten.ops.triton.arrange import cdiv, dense, on, processors, served
from hasten.ops.triton.launch import dependent, go, wait
from hasten.ops.triton.norm import WIDEST, norm_launch, normalized


@triton.jit
def load_vector(at, i, width, OTHER: tl.constexpr):
    """(1, BLOCK) of what every row shares; OTHER everywhere if there is none."""
    if at is None:  # noqa: SIM108 - this one is decided when the kernel is compiled
        v = tl.full((i.shape[0],), OTHER, tl.float32)
    else:
        v = tl.load(at + i, mask=i < width, other=0.0)
    return v[None, :]


@triton.jit(do_not_specialize=("count",))
def settle_rows(
    y,
    residual,
    layer_scale,
    inner,
    inner_bias,
    outer,
    outer_bias,
    out,
    count,
    width,
    y_row,
    residual_row,
    scale,
    inner_eps,
    inner_offset,
    outer_eps,
    outer_offset,
    INNER: tl.constexpr,
    INNER_WIDE: tl.constexpr,
    OUTER: tl.constexpr,
    OUTER_WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (i < width)[None, :]
    # a row of more than half the widest has no registers for what could be loaded ahead
    EARLY: tl.constexpr = BLOCK <= 8192
    if EARLY:
        w, b = load_vector(inner, i, width, 1.0), load_vector(inner_bias, i, width, 0.0)
        own = load_vector(layer_scale, i, width, 1.0)
        g, c = load_vector(outer, i, width, 1.0), load_vector(outer_bias, i, width, 0.0)
    wait(PDL)
    at = row.to(tl.int64)[:, None]
    x = tl.load(y + at * y_row + i[None, :], mask=inside, other=0.0).to(tl.float32)
    r_at = residual + at * residual_row + i[None, :]
    if EARLY:
        r = tl.load(r_at, mask=inside, other=0.0)
    if INNER != "none":
        if not EARLY:
            w = load_vector(inner, i, width, 1.0)
        x = normalized(x, inside, w, None, width, inner_eps, inner_offset, INNER, INNER_WIDE, out.dtype.element_ty)
        if not EARLY:
            b = load_vector(inner_bias, i, width, 0.0)
        x += b.to(tl.float32)
    if not EARLY:
        own = load_vector(layer_scale, i, width, 1.0)
        r = tl.load(r_at, mask=inside, other=0.0)
    x = r.to(tl.float32) + x * own.to(tl.float32) * scale
    if OUTER != "none":
        if not EARLY:
            g = load_vector(outer, i, width, 1.0)
        x = normalized(x, inside, g, None, width, outer_eps, outer_offset, OUTER, OUTER_WIDE, out.dtype.element_ty)
        if not EARLY:
            c = load_vector(outer_bias, i, width, 0.0)
        x += c.to(tl.float32)
    tl.store(out + at * width + i[None, :], x.to(out.dtype.element_ty), mask=inside)


def vectors(n: NormLayer | None) -> tuple[Tensor | None, Tensor | None]:
    """A norm's weight, and the bias where its kind has one."""
    if n is None:
        return None, None
    return n.weight, n.bias if n.spec.kind == "layer" else None


def _accepts(
    y: Tensor,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> bool:
    parts = (*vectors(inner), *vectors(outer), layer_scale)
    alone = all(t is None or (t.shape == y.shape[-1:] and t.stride(0) == 1) for t in parts)
    same = residual.shape == y.shape and all(t is None or t.dtype == y.dtype for t in (residual, layer_scale))
    return y.dim() > 1 and 0 < y.shape[-1] <= WIDEST and alone and same and served(y, residual, *parts)


@settle.register("triton", devices="cuda", accepts=_accepts, invariant=True)
def _(
    y: Tensor,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> Tensor:
    out, width = y.new_empty(y.shape), y.shape[-1]
    if not out.numel():
        return out
    y, residual = (dense(t).flatten(0, -2) for t in (y, residual))
    shape = norm_launch(width, 1 if is_invariant() else len(y), processors(y.device))
    around = [None if n is None else n.spec for n in (inner, outer)]
    numbers = [x for s in around for x in ((0.0, 0.0) if s is None else (s.eps, s.offset))]
    kinds = [x for s in around for x in (("none", False) if s is None else (s.kind, s.wide))]
    with on(y):
        settle_rows[(cdiv(len(y), shape.rows),)](
            y,
            residual,
            layer_scale,
            *vectors(inner),
            *vectors(outer),
            out,
            len(y),
            width,
            y.stride(0),
            residual.stride(0),
            scale,
            *numbers,
            **dict(zip(("INNER", "INNER_WIDE", "OUTER", "OUTER_WIDE"), kinds, strict=True)),
            ROWS=shape.rows,
            BLOCK=shape.block,
            num_warps=shape.warps,
            **dependent(y.device),
        )
    return out
