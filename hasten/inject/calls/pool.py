"""What a model makes `pooler_output` of: one token of the last hidden state, or all, through modules of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hasten.errors import RequestError

if TYPE_CHECKING:
    from hasten.inject.backbone import Backbone

FIRST_EOS = 2  # CLIP configs that name this id mean the largest id of a row instead, which is the true end of text


def pool(b: Backbone, last: Tensor, x: Tensor) -> Tensor | None:
    """`pooler_output` of the last hidden state (batch, tokens, width); None where the model has none.

    x: the backbone's input, whose ids say where a text ends.
    """
    modules = poolers(b)
    if b.seam.pools is None or len(modules) < len(b.seam.pooler):
        return None
    match b.seam.pools:
        case "all":
            y = last
        case "first":
            y = last[:, 0]
        case "last":
            y = last[:, -1]
        case "eos":
            y = last[torch.arange(len(last), device=last.device), _end(x, b.config.eos_token_id)]
    for module in modules:
        y = module(y)
    return y


def poolers(b: Backbone) -> list[nn.Module]:
    """The model's own modules that make `pooler_output`, in order."""
    return [m for name in b.seam.pooler if (m := getattr(b.module, name, None)) is not None]


def _end(ids: Tensor, eos: int) -> Tensor:
    """The index (batch,) of the first end-of-text token of each row of ids (batch, tokens); 0 where there is none."""
    if ids.is_floating_point():
        raise RequestError("input_ids are needed: where a text ends cannot be seen in inputs_embeds")
    return (ids if eos == FIRST_EOS else (ids == eos).int()).int().argmax(-1)
