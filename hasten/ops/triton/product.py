"""Products of two to sixty-four rows, and the regions that end with what their kernel does behind the product."""

from __future__ import annotations

from torch import Tensor

from hasten.ops.linear import Matrix, linear
from hasten.ops.norm import NormLayer, norm
from hasten.ops.region import head, project, up
from hasten.ops.triton.act import CURVES
from hasten.ops.triton.arrange import served
from hasten.ops.triton.shapes import launch_for
from hasten.ops.triton.skinny import Ending, SkinnyLaunch, multiply
from hasten.spec import Head, Mlp


def launch_of(x: Tensor, m: Matrix, gated: bool = False) -> SkinnyLaunch | None:
    """The launch for x times m, or None where cuBLAS, or nobody here, multiplies them."""
    if not isinstance(m, Matrix) or x.dim() < 2 or m.weight.dim() != 2:
        return None
    w = m.weight
    plain = w.dtype == x.dtype and w.stride(1) == 1 and w.numel() > 0 and (m.bias is None or m.bias.stride(0) == 1)
    if not plain or not served(x, w, m.bias):
        return None
    return launch_for(x.device, x.dtype, gated, *w.shape, x.shape[:-1].numel())


def _multiply(x: Tensor, m: Matrix, e: Ending) -> Tensor:
    shape = launch_of(x, m, e.gated)
    assert shape is not None, "accepted only with a launch"
    return multiply(x, m, e, shape)


@linear.register("triton", devices="cuda", accepts=lambda x, m: launch_of(x, m) is not None)
def _(x: Tensor, m: Matrix) -> Tensor:
    return _multiply(x, m, Ending())


@head.register("triton", devices="cuda", accepts=lambda x, before, m, h: launch_of(x, m) is not None)
def _(x: Tensor, before: NormLayer | None, m: Matrix, h: Head) -> Tensor:
    return _multiply(x if before is None else norm(x, before), m, Ending(gain=h.scale, softcap=h.softcap))


def _accepts_up(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> bool:
    known = mlp.act in CURVES or (mlp.gated and mlp.act == "clamped_swiglu")
    return known and launch_of(x, m, mlp.gated) is not None


@up.register("triton", devices="cuda", accepts=_accepts_up)
def _(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> Tensor:
    return _multiply(x if before is None else norm(x, before), m, Ending(act=mlp.act, gated=mlp.gated))


def _accepts_project(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> bool:
    """Norms see whole rows, of which a program has a part: with them, `linear` and `settle` do it."""
    if inner is not None or outer is not None or launch_of(x, m) is None:
        return False
    mine = residual.dtype == x.dtype and residual.shape == (*x.shape[:-1], len(m.weight)) and served(residual)
    own = layer_scale is None or (layer_scale.dtype == x.dtype and layer_scale.stride(0) == 1 and served(layer_scale))
    return mine and own


@project.register("triton", devices="cuda", accepts=_accepts_project)
def _(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> Tensor:
    return _multiply(x, m, Ending(residual=residual, scale=scale, layer_scale=layer_scale))
