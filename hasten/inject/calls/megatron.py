"""Megatron-LM's language models: masks that are True where hidden, hidden states (tokens, batch, width)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.errors import RequestError
from hasten.inject.calls.call import Call, count_positions, run_blocks
from hasten.model import Dense
from hasten.spec import Tokens

if TYPE_CHECKING:
    from hasten.inject.backbone import Arguments, Backbone

IDS, POSITIONS, MASK = (
    ("enc_input_ids", "input_ids"),
    ("enc_position_ids", "position_ids"),
    ("enc_attn_mask", "attention_mask"),
)
"""Names of the first three arguments, in newer and in older versions."""


def run(b: Backbone, a: Arguments) -> Any:
    """The last hidden state, and what the pooler makes of it where the model has one."""
    e, ids = b.tower.embed, _first(a, IDS)
    assert isinstance(e, Tokens)
    if ids is None or ids.is_floating_point():
        raise RequestError(f"input_ids must be integers (batch, tokens), got {getattr(ids, 'dtype', None)}")
    positions = _first(a, POSITIONS)
    if positions is None:
        positions = count_positions(e, ids, None, 0)
    unseen = _first(a, MASK)
    masks: dict[bool, Tensor | None] | None = None if unseen is None else {False: ~unseen}
    x = b.transformer.embed(ids, positions, a.get("tokentype_ids"))
    last, _ = run_blocks(b, x, Dense(positions, masks=masks), False)
    if _tokens_first(b.module, ids.device):
        last = last.transpose(0, 1).contiguous()
    module: Any = b.module
    if not getattr(module, "add_pooler", False):
        return last
    return last, module.pooler(last, a.get("pooling_sequence_index") or 0)


def unfit(a: Arguments) -> str | None:
    unseen = _first(a, MASK)
    if unseen is not None and (unseen.dtype != torch.bool or unseen.ndim != 4):
        return f"the mask is {unseen.dtype} with {unseen.ndim} axes, not bool (batch, heads, queries, keys)"
    return None


def hidden(b: Backbone, output: Any) -> Tensor:
    x = output[0] if isinstance(output, tuple) else output
    return x.transpose(0, 1) if _tokens_first(b.module, x.device) else x


def _first(a: Arguments, names: tuple[str, ...]) -> Tensor | None:
    return next((a[n] for n in names if a.get(n) is not None), None)


@torch.no_grad()
def _tokens_first(module: nn.Module, device: torch.device) -> bool:
    """Whether hidden states are (tokens, batch, width) outside the layers too, as they are since sequence parallelism.

    Two tokens through the model's own embedding tell: configs do not.
    """
    embedding = module.embedding
    assert isinstance(embedding, nn.Module)
    two = torch.zeros(1, 2, dtype=torch.long, device=device)
    types = None if getattr(embedding, "tokentype_embeddings", None) is None else two
    return embedding(two, two, types).shape[0] == 2


MEGATRON = Call(run, frozenset({*IDS, *POSITIONS, *MASK, "tokentype_ids", "pooling_sequence_index"}), unfit, hidden)
