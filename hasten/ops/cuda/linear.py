"""The product with a matrix of x's own dtype: one call of cuBLAS, bias included, nothing promoted or cast back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hasten.ops.linear import Matrix, linear


def one_dtype(x: Tensor, m: Matrix) -> bool:
    """Whether x, weights and bias are plain numbers of one dtype."""
    return isinstance(m, Matrix) and m.weight.dtype == x.dtype and (m.bias is None or m.bias.dtype == x.dtype)


@linear.register("cublas", devices="cuda", accepts=one_dtype)
def _(x: Tensor, m: Matrix) -> Tensor:
    return F.linear(x, m.weight, m.bias)
