"""Regions on the CPU: oneDNN applies the activation while the product is still in registers.

It saves a pass over the widest tensor of a block. A float32 product of many rows is torch's own game, so there it has
to save more than that: the tanh of `gelu_tanh`, a tenth of such a region.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.ops.cpu.linear import FEW, ONEDNN, one_dtype
from hasten.ops.linear import Matrix
from hasten.ops.norm import NormLayer, norm
from hasten.ops.region import up
from hasten.spec import Mlp

POINTWISE = {  # our activation -> oneDNN's, and its algorithm
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "tanh": ("tanh", ""),
}
BFLOAT16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fused(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> bool:
    """Whether oneDNN has the activation, takes these numbers, and sees enough rows to gain."""
    if mlp.gated or mlp.act not in POINTWISE or not one_dtype(x, m):
        return False
    rows = x.shape[:-1].numel()
    if x.dtype == torch.bfloat16:
        return BFLOAT16 and rows >= FEW.start
    many = rows >= FEW.stop and mlp.act == "gelu_tanh"
    return ONEDNN and x.dtype == torch.float32 and (rows in FEW or many)


@up.register("onednn", devices="cpu", accepts=fused)
def _(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> Tensor:
    attribute, algorithm = POINTWISE[mlp.act]
    x = x if before is None else norm(x, before)
    return torch.ops.mkldnn._linear_pointwise(x, m.weight, m.bias, attribute, [], algorithm)
