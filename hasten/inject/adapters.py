"""Models wrapped by PEFT: their adapters are merged when asked for, refused otherwise."""

from __future__ import annotations

from torch import nn

from hasten.errors import UnsupportedModel

TUNERS = ("peft.tuners", "peft.peft_model")


def merge_adapters(model: nn.Module, wanted: bool) -> nn.Module:
    """The model without adapter layers; UnsupportedModel for one that has them, unless merging them is `wanted`.

    Merging adds the adapters to the base weights, in place, and cannot be undone exactly.
    """
    adapted = [n or type(m).__name__ for n, m in model.named_modules() if type(m).__module__.startswith(TUNERS)]
    if not adapted:
        return model
    if not wanted:
        raise UnsupportedModel(
            f"{type(model).__name__} has PEFT adapters ({adapted[0]} and {len(adapted) - 1} more): a fused backbone "
            "would leave them out. Pass merge_adapters=True to merge them into the weights, or call merge_and_unload()"
        )
    if not hasattr(model, "merge_and_unload"):
        raise UnsupportedModel(
            f"{type(model).__name__} holds PEFT layers but has no merge_and_unload(): merge them first"
        )
    return model.merge_and_unload()  # pyright: ignore[reportCallIssue]
