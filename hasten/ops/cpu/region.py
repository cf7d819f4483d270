"""Regions on the CPU: the activation inside the product, and sums into tensors that are ours."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.ops.cpu.linear import one_dtype
from hasten.ops.linear import Matrix, linear
from hasten.ops.norm import NormLayer, norm
from hasten.ops.region import project, up
from hasten.spec import Mlp

POINTWISE = {  # our activation -> oneDNN's, and its algorithm
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "tanh": ("tanh", ""),
}
ROWS = 8  # below, a float32 product waits for memory, and oneDNN's is the slower one


def fused(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> bool:
    """Whether oneDNN has the activation, takes these dtypes, and sees enough rows to gain."""
    if mlp.gated or mlp.act not in POINTWISE or not one_dtype(x, m) or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype == torch.float32 and x.numel() >= ROWS * m.weight.shape[1]


@up.register("torch", devices="cpu", accepts=fused)
def _(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> Tensor:
    attribute, algorithm = POINTWISE[mlp.act]
    x = x if before is None else norm(x, before)
    return torch.ops.mkldnn._linear_pointwise(x, m.weight, m.bias, attribute, [], algorithm)


def in_place(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> bool:
    return residual.dtype == x.dtype and residual.shape[:-1] == x.shape[:-1] and residual.shape[-1] == m.weight.shape[0]


@project.register("torch", devices="cpu", accepts=in_place)
def _(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> Tensor:
    y = linear(x, m)
    if inner is not None:
        y = norm(y, inner)
    if layer_scale is not None:
        y = y * layer_scale
    y = y.mul_(scale) if scale != 1.0 else y
    y = y.add_(residual)
    return y if outer is None else norm(y, outer)
