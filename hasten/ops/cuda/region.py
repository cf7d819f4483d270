"""Regions whose activation cuBLAS applies while the product is still in registers: relu, and gelu by its tanh.

It has no erf, so the exact gelu of BERT is not among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.ops.cuda.linear import one_dtype
from hasten.ops.linear import Matrix
from hasten.ops.norm import NormLayer, norm
from hasten.ops.region import up
from hasten.spec import Mlp

GELU = {"relu": False, "gelu_tanh": True}  # our activation -> whether cuBLAS calls it gelu
TENSOR_CORE = frozenset((torch.float16, torch.bfloat16))


def fused(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> bool:
    """Whether cuBLAS has the activation; its epilogues come with a bias only."""
    plain = not mlp.gated and mlp.act in GELU and m.bias is not None
    tracked = torch.is_grad_enabled() and x.requires_grad
    return plain and not tracked and x.dtype in TENSOR_CORE and x.dim() > 0 and x.numel() > 0 and one_dtype(x, m)


@up.register("cublas", devices="cuda", accepts=fused)
def _(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> Tensor:
    assert m.bias is not None, "accepted with a bias only"
    x = x if before is None else norm(x, before)
    flat = x.reshape(-1, x.shape[-1])
    y = torch.ops.aten._addmm_activation(m.bias, flat, m.weight.t(), use_gelu=GELU[mlp.act])
    return y.view(*x.shape[:-1], -1)
