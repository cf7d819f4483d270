"""The product with a matrix that has x's dtype already: nothing to promote, nothing to cast back.

torch's own product is MKL's. From four rows to fifteen oneDNN's float32 product is up to 1.4 times as fast; where the
compiled kernels are in use (native.py), those come first, and are faster than both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.linear import Matrix, linear

FEW = range(4, 16)
"""Rows for which oneDNN multiplies float32."""
ONEDNN = torch.backends.mkldnn.is_available()


def one_dtype(x: Tensor, m: Matrix) -> bool:
    """Whether x, weights and bias are plain numbers of one dtype; oneDNN reads a bias as if it had no gaps."""
    b = m.bias
    return (
        isinstance(m, Matrix)
        and m.weight.dtype == x.dtype
        and (b is None or (b.dtype == x.dtype and b.stride(-1) == 1))
    )


def few_rows(x: Tensor, m: Matrix) -> bool:
    """Whether oneDNN is there and the faster one."""
    return ONEDNN and x.shape[:-1].numel() in FEW and x.dtype == torch.float32 and one_dtype(x, m)


@linear.register("onednn", devices="cpu", accepts=few_rows)
def _(x: Tensor, m: Matrix) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, m.weight, m.bias, "none", [], "")


@linear.register("torch", devices="cpu", accepts=one_dtype)
def _(x: Tensor, m: Matrix) -> Tensor:
    return F.linear(x, m.weight, m.bias)
