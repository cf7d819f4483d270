"""Activations by our own names, and gated ones: the mlp's non-linearity."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.table import op_by_rows


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """GPT-OSS: both halves clamped at 7, a steeper sigmoid, and one added to the linear half."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "tanh": torch.tanh,
}
GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: (lambda gate, up, f=f: f(gate) * up) for name, f in ACTS.items()},
    "clamped_swiglu": clamped_swiglu,
}


@op_by_rows
def act(x: Tensor, kind: str) -> Tensor:
    """ACTS[kind] of every element."""
    return ACTS[kind](x)


@op_by_rows
def gated(x: Tensor, kind: str) -> Tensor:
    """(..., 2 width) [gate | up] to (..., width): GATED[kind](gate, up)."""
    gate, up = x.chunk(2, -1)
    return GATED[kind](gate, up)
