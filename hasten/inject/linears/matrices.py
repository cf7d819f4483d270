"""The modules that multiply by a matrix, and how each kind keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class Layout:
    """Axes of outputs and inputs in `weight`, the product, and the attributes that count outputs and inputs."""

    outputs: int
    inputs: int
    product: Callable[[Tensor, Tensor], Tensor]
    counts: tuple[str, str]


LAYOUTS: dict[type[nn.Module], Layout] = {
    nn.Linear: Layout(0, 1, F.linear, ("out_features", "in_features")),
    Conv1D: Layout(1, 0, lambda x, weight: x @ weight, ("nf", "nx")),
}


def layout(module: nn.Module) -> Layout | None:
    """The layout of a module whose forward is that of a known class; None for any other."""
    known = next((c for c in LAYOUTS if isinstance(module, c)), None)
    return LAYOUTS[known] if known is not None and type(module).forward is known.forward else None


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """By path, every module with a known layout."""
    return {path: m for path, m in model.named_modules() if path and layout(m) is not None}


def outputs(module: nn.Module) -> int:
    """How many features a linear gives."""
    found = layout(module)
    assert found is not None
    return module.get_parameter("weight").shape[found.outputs]


def inputs(module: nn.Module) -> int:
    """How many features a linear takes."""
    found = layout(module)
    assert found is not None
    return module.get_parameter("weight").shape[found.inputs]


def summed(module: nn.Module, x: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
    """(..., inputs) -> (..., outputs); `add` makes of a rank's products the sum of all, to which the bias is added."""
    found, bias = layout(module), dict(module.named_parameters(recurse=False)).get("bias")
    assert found is not None
    y = add(found.product(x, module.get_parameter("weight")))
    return y if bias is None else y + bias
