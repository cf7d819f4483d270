"""Norms in one pass: torch's kernel reads a row once, the reference once per operation.

The root-mean-square kernel rounds before it multiplies by the weight, so it serves float32 alone, where that is no
rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.norm import NormLayer, norm


def one_dtype(x: Tensor, n: NormLayer) -> bool:
    """Whether one vector of weights, stored as they are meant and in x's dtype, serves every row."""
    w = n.weight
    return w.dim() == 1 and w.dtype == x.dtype and not n.spec.offset and (n.bias is None or n.bias.dtype == x.dtype)


def layer(x: Tensor, n: NormLayer) -> bool:
    return n.spec.kind == "layer" and one_dtype(x, n)


def float32_rms(x: Tensor, n: NormLayer) -> bool:
    return n.spec.kind == "rms" and x.dtype == torch.float32 and one_dtype(x, n)


@norm.register("torch", devices="cpu", accepts=layer)
def _(x: Tensor, n: NormLayer) -> Tensor:
    return F.layer_norm(x, n.weight.shape, n.weight, n.bias, n.spec.eps)


@norm.register("torch", devices="cpu", accepts=float32_rms)
def _(x: Tensor, n: NormLayer) -> Tensor:
    return F.rms_norm(x, n.weight.shape, n.weight, n.spec.eps)
