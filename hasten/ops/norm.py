"""Layer and root-mean-square normalisation (arXiv 1607.06450, 1910.07467)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.table import op
from hasten.parallel import Group
from hasten.spec import Norm


@dataclass(frozen=True, slots=True, eq=False)
class NormLayer:
    """A norm with its weights: (width,), or (heads, head_dim) where every head has its own."""

    spec: Norm
    weight: Tensor
    bias: Tensor | None = None


@op
def norm(x: Tensor, n: NormLayer) -> Tensor:
    """(..., width) normalised over its last axis in float32 or wider, in x's dtype and shape."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if n.spec.kind == "layer":
        return _weighted(F.layer_norm(y, x.shape[-1:], eps=n.spec.eps), n, x.dtype)
    return _weighted(y * torch.rsqrt(y.square().mean(-1, keepdim=True) + n.spec.eps), n, x.dtype)


def _weighted(y: Tensor, n: NormLayer, dtype: torch.dtype) -> Tensor:
    """What has been normalised times the weight, and the bias, in `dtype`."""
    s, wide = n.spec, y.dtype
    if s.kind == "rms" and not s.wide:
        return (s.offset + n.weight.to(dtype)) * y.to(dtype)
    y = y * (s.offset + n.weight.to(wide))
    return (y if n.bias is None else y + n.bias.to(wide)).to(dtype)


def norms_over(parts: Sequence[tuple[Tensor, NormLayer]], group: Group) -> list[Tensor]:
    """Norms of widths that the ranks divide: each x (..., share of a width) with its share of the weight, as `norm`.

    All parts share an exchange, or two if they are layer norms; they are of one kind and have the same leading axes.
    """

    def means(ys: Sequence[Tensor]) -> Sequence[Tensor]:
        own = torch.cat([y.mean(-1, keepdim=True) for y in ys], -1)
        return (group.all_reduce(own) / group.size).split(1, -1)

    ys = [x.to(torch.promote_types(x.dtype, torch.float32)) for x, _ in parts]
    if parts[0][1].spec.kind == "layer":
        ys = [y - mean for y, mean in zip(ys, means(ys), strict=True)]
    squares = means([y.square() for y in ys])
    return [
        _weighted(y * torch.rsqrt(square + n.spec.eps), n, x.dtype)
        for (x, n), y, square in zip(parts, ys, squares, strict=True)
    ]
