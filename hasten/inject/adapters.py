"""Models wrapped by PEFT: their adapters are merged when asked for, refused otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from hasten.errors import UnsupportedModel

TUNERS = ("peft.tuners", "peft.peft_model")


def merge_adapters(model: nn.Module, wanted: bool, rehearse: Callable[[nn.Module], object]) -> nn.Module:
    """The model without adapter layers; UnsupportedModel for one that has them, unless merging them is `wanted`.

    Merging adds the adapters to the base weights, in place, and cannot be undone exactly: so `rehearse` gets the model
    as it would be, with all tensors on meta, before anything is merged, and may refuse it.
    """
    adapted = [n or type(m).__name__ for n, m in model.named_modules() if type(m).__module__.startswith(TUNERS)]
    if not adapted:
        return model
    if not wanted:
        raise UnsupportedModel(
            f"{type(model).__name__} has PEFT adapters ({adapted[0]} and {len(adapted) - 1} more): a fused backbone "
            "would leave them out. Pass merge_adapters=True to merge them into the weights, or call merge_and_unload() "
            "yourself"
        )
    if not hasattr(model, "merge_and_unload"):
        raise UnsupportedModel(
            f"{type(model).__name__} holds PEFT layers but has no merge_and_unload(): merge them first"
        )
    peft: Any = _on_meta(model)
    rehearse(peft.unload())
    peft = model
    return peft.merge_and_unload()


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors have shapes and names but no values, and take no memory."""
    instead: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    instead |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, instead)
