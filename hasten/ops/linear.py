"""Matrices, in whatever format they are stored, and the product with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.table import op


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """(rows, columns) weights, or (experts, rows, columns), as they are; a bias of (..., rows).

    A number format is another class with the same `bias` and `decode`.
    """

    weight: Tensor
    bias: Tensor | None = None

    def decode(self) -> Tensor:
        return self.weight


@op
def linear(x: Tensor, m: Matrix) -> Tensor:
    """(..., columns) to (..., rows): x W^T + b, in the wider of both dtypes, in x's dtype."""
    w = m.decode()
    wide = torch.promote_types(x.dtype, w.dtype)
    return F.linear(x.to(wide), w.to(wide), None if m.bias is None else m.bias.to(wide)).to(x.dtype)
