"""Layer and root-mean-square normalisation (arXiv 1607.06450, 1910.07467)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.table import op
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
    s, wide = n.spec, torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if s.kind == "layer":
        y = F.layer_norm(y, x.shape[-1:], eps=s.eps) * (s.offset + n.weight.to(wide))
        return (y if n.bias is None else y + n.bias.to(wide)).to(x.dtype)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + s.eps)
    if s.wide:
        return (y * (s.offset + n.weight.to(wide))).to(x.dtype)
    return (s.offset + n.weight.to(x.dtype)) * y.to(x.dtype)
