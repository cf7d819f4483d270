"""Products of more than sixty-four rows, and the regions that end with what a kernel does behind the product.

cuBLAS is as good as a product gets; these take what it leaves on the table. For few rows that is the gap between
kernels, for ours start early. For thousands it is the pass over a wide tensor that an activation or a residual costs by
itself: without either, the product is cuBLAS', and a gated one too, whose product with two matrices is a fifth slower
here than cuBLAS' and the kernel for the gate together.

Where a row's answer must not depend on the rows beside it, one kernel takes any number of them, from one row on, and
every matrix whose rows it can read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.ops.linear import Matrix, linear
from hasten.ops.norm import NormLayer, norm
from hasten.ops.region import project, project_normed, up
from hasten.ops.settle import settle
from hasten.ops.table import is_invariant
from hasten.ops.triton.act import CURVES
from hasten.ops.triton.arrange import interpreted, processors, served
from hasten.ops.triton.gemm import FEW, GemmLaunch, described, fixed_launch, gemm_launch, multiply
from hasten.ops.triton.gemm_wide import WideLaunch, multiply_wide, wide_launch
from hasten.ops.triton.norm import WIDEST
from hasten.ops.triton.sums import add_up
from hasten.spec import Mlp

FEWEST = 97  # rows that fill enough of a tile of 128; fewer than 65 are product.py's
ONE_TILE = 128  # rows up to which a product alone is faster than cuBLAS' too, if it has enough columns
COLUMNS = 2048
BY_CUBLAS = frozenset(("relu", "gelu_tanh"))  # activations that it applies itself, behind a bias
CACHED = 2**23  # numbers of 16 bits that the second-level cache holds well, for the kernel of the activation behind
SMALL = 2**22  # numbers of a matrix that is read in so little time that the gap before it counts


def _fits(x: Tensor, m: Matrix, *more: Tensor | None) -> bool:
    """Whether x and a matrix of rows in one piece, both of 16 bits, are read 16 bytes at a time."""
    if x.dim() < 2 or not isinstance(m, Matrix) or m.weight.dim() != 2:
        return False
    w, narrow, step = m.weight, (torch.float16, torch.bfloat16), 8 if is_invariant() else 16
    if not is_invariant() and (x.shape[:-1].numel() < FEWEST or len(w) % 16):
        return False
    numbers = x.dtype == w.dtype and (x.dtype in narrow or (interpreted() and x.dtype == torch.float32))
    whole = w.stride(0) % step == 0 and w.shape[1] % step == 0 and described(w)
    return numbers and whole and served(x, w, m.bias, *more)


def _few(x: Tensor, m: Matrix, most: int) -> bool:
    return is_invariant() or (x.shape[:-1].numel() <= most and m.weight.numel() <= SMALL)


def _wide(x: Tensor, m: Matrix) -> WideLaunch | None:
    """The launch of the kernel for thousands of rows, where it leaves no processor idle."""
    rows = x.shape[:-1].numel()
    several = rows > FEW and not is_invariant()
    return wide_launch(rows, m.weight.shape[0], processors(x.device)) if several else None


def _alone(x: Tensor, m: Matrix) -> bool:
    return is_invariant() or (_few(x, m, ONE_TILE) and len(m.weight) >= COLUMNS)


def _accepts_linear(x: Tensor, m: Matrix) -> bool:
    return _fits(x, m) and _alone(x, m)


@linear.register("triton", devices="cuda", accepts=_accepts_linear, invariant=True)
def _(x: Tensor, m: Matrix) -> Tensor:
    out = x.new_empty(*x.shape[:-1], m.weight.shape[0])
    multiply(flat(x), m, out.flatten(0, -2), _launch(x, m, False, False))
    return out


def _accepts_up(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> bool:
    known = mlp.act in CURVES or (mlp.gated and mlp.act == "clamped_swiglu")
    if not known or not _fits(x, m):
        return False
    large = x.shape[:-1].numel() * len(m.weight) > CACHED
    mine = not mlp.gated and large and (m.bias is None or mlp.act not in BY_CUBLAS)
    return _alone(x, m) or (mine and _wide(x, m) is not None)


@up.register("triton", devices="cuda", accepts=_accepts_up, invariant=True)
def _(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> Tensor:
    x = x if before is None else norm(x, before)
    out, wide = x.new_empty(*x.shape[:-1], mlp.width), _wide(x, m)
    if wide is None:
        multiply(flat(x), m, out.flatten(0, -2), _launch(x, m, mlp.gated, False), gated=mlp.gated, act=mlp.act)
    else:
        multiply_wide(flat(x), m, out.flatten(0, -2), wide, act=mlp.act)
    return out


def _accepts_project(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> bool:
    """Many rows are worth it only where no norm keeps the end of the product from being the end of the region."""
    if residual.dtype != x.dtype or not _fits(x, m, residual, layer_scale) or len(m.weight) > WIDEST:
        return False
    return _few(x, m, FEW) or (inner is None and outer is None and _wide(x, m) is not None)


@project.register("triton", devices="cuda", accepts=_accepts_project, invariant=True)
def _(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> Tensor:
    return _project(x, m, residual, inner, outer, scale, layer_scale, None)[0]


def _accepts_project_normed(x: Tensor, m: Matrix, *given: Any) -> bool:
    """Where sums are added up by rows, whose norm then is at hand."""
    mine = _accepts_project(x, m, *given[:-1]) and not is_invariant()
    return mine and _few(x, m, FEW) and _launch(x, m, False, True).splits > 1


@project_normed.register("triton", devices="cuda", accepts=_accepts_project_normed)
def _(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
    then: NormLayer,
) -> tuple[Tensor, Tensor | None]:
    return _project(x, m, residual, inner, outer, scale, layer_scale, then)


def _project(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
    then: NormLayer | None,
) -> tuple[Tensor, Tensor | None]:
    wide = _wide(x, m)
    if inner is None and outer is None and wide is not None:
        out = x.new_empty(residual.shape)
        multiply_wide(
            flat(x), m, out.flatten(0, -2), wide, residual=flat(residual), scale=scale, layer_scale=layer_scale
        )
        return out, None
    shape = _launch(x, m, False, True)
    if shape.splits > 1:
        sums = torch.empty(shape.splits, *flat(residual).shape, dtype=torch.float32, device=x.device)
        multiply(flat(x), m, sums, shape)
        return add_up(sums, m.bias, residual, inner, outer, scale, layer_scale, then)
    out = x.new_empty(residual.shape)
    if inner is None and outer is None:
        multiply(flat(x), m, out.flatten(0, -2), shape, residual=flat(residual), scale=scale, layer_scale=layer_scale)
        return out, None
    multiply(flat(x), m, out.flatten(0, -2), shape)
    return settle(out, residual, inner, outer, scale, layer_scale), None


def _launch(x: Tensor, m: Matrix, gated: bool, splits: bool) -> GemmLaunch:
    rows, columns, depth = x.shape[:-1].numel(), m.weight.shape[0] // (2 if gated else 1), m.weight.shape[1]
    if is_invariant():
        return fixed_launch(rows, columns, gated, processors(x.device))
    return gemm_launch(rows, columns, depth, gated, splits, processors(x.device))


def flat(x: Tensor) -> Tensor:
    """(..., width) as (rows, width), as they lie if rows can be read 16 bytes at a time, else copied."""
    y = x.flatten(0, -2)
    return y if described(y) else y.clone(memory_format=torch.contiguous_format)
