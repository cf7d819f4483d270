"""What follows a sublayer's last matrix: its norm and scales, the residual, the norm of the sum."""

from __future__ import annotations

from torch import Tensor

from hasten.ops.norm import NormLayer, norm
from hasten.ops.table import op
from hasten.parallel import Group


@op
def settle(
    y: Tensor,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> Tensor:
    """outer(residual + inner(y) * layer_scale * scale), each of them optional: what `project` does behind its matrix.

    y and residual (..., width); layer_scale (width,). Experts end with it too.
    """
    if inner is not None:
        y = norm(y, inner)
    if layer_scale is not None:
        y = y * layer_scale
    y = residual + (y if scale == 1.0 else y * scale)
    return y if outer is None else norm(y, outer)


@op
def settle_over(
    y: Tensor,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
    group: Group,
) -> Tensor:
    """`settle` of the sum of all ranks' y, (..., width) and free to be overwritten; the rest is the same on each."""
    return settle(group.all_reduce(y.contiguous()), residual, inner, outer, scale, layer_scale)
