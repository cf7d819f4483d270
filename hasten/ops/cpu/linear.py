"""The product with a matrix that has x's dtype already: nothing to promote, nothing to cast back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.linear import Matrix, linear


def one_dtype(x: Tensor, m: Matrix) -> bool:
    """Whether x, weights and bias are plain numbers of one dtype."""
    return isinstance(m, Matrix) and m.weight.dtype == x.dtype and (m.bias is None or m.bias.dtype == x.dtype)


def one_row(x: Tensor, m: Matrix) -> bool:
    return x.dtype == torch.float32 and m.bias is not None and one_dtype(x, m) and x.numel() == m.weight.shape[1]


@linear.register("torch", devices="cpu", accepts=one_row)
def _(x: Tensor, m: Matrix) -> Tensor:
    y = torch.addmv(m.bias, m.weight, x.reshape(-1))
    return y.view(*x.shape[:-1], -1)


@linear.register("torch", devices="cpu", accepts=one_dtype)
def _(x: Tensor, m: Matrix) -> Tensor:
    return F.linear(x, m.weight, m.bias)
