"""Encoders alone: BERT-like models and the text towers of CLIP-like ones, with the pooled output that some have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from hasten.inject.calls.call import COMMON, Call, count_positions, default, give, inputs, run_blocks, split_mask
from hasten.inject.calls.pool import pool
from hasten.model import Dense
from hasten.spec import Tokens

if TYPE_CHECKING:
    from hasten.inject.backbone import Arguments, Backbone


def run(b: Backbone, a: Arguments) -> Any:
    e, x = b.tower.embed, inputs(a)
    assert isinstance(e, Tokens)
    seen, masks = split_mask(a.get("attention_mask"), 0, x.shape[1])
    positions = a.get("position_ids")
    if positions is None:
        positions = count_positions(e, x, seen, 0)
    elif e.counted == "ids":  # RoBERTa's callers name rows of the table, offset included
        positions = positions - e.position_offset
    ctx = Dense(positions, seen=seen, masks=masks, buckets=b.transformer.buckets)
    h = b.transformer.embed(x, positions, a.get("token_type_ids"))
    last, states = run_blocks(b, h, ctx, bool(default(b, a, "output_hidden_states")))
    pooled = pool(b, last, x)
    output = BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=last, pooler_output=pooled, hidden_states=states
    )
    given = give(output, b, a)
    if isinstance(given, tuple) and pooled is None and b.seam.pools and "return_dict" in b.signature.parameters:
        return (given[0], None, *given[1:])  # a forward that builds its tuple itself keeps the place of what it lacks
    return given


def unfit(a: Arguments) -> str | None:
    mask = a.get("attention_mask")
    return "attention_mask has three axes" if getattr(mask, "ndim", 2) == 3 else None


ENCODER = Call(
    run, COMMON | {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "use_cache"}, unfit
)
