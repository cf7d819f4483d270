"""Encoder-decoders: the encoder's call, and the decoder's with its two caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from hasten.inject.calls.call import (
    COMMON,
    Call,
    count_positions,
    default,
    give,
    hiding,
    inputs,
    packed,
    run_blocks,
    split_mask,
)
from hasten.inject.hf_cache import CACHE, HfStore, field, length
from hasten.model import Dense
from hasten.spec import Frames, Tokens

if TYPE_CHECKING:
    from hasten.inject.backbone import Arguments, Backbone

KEPT = field(BaseModelOutputWithPastAndCrossAttentions)


def encode(b: Backbone, a: Arguments) -> Any:
    e, x = b.tower.embed, inputs(a)
    assert isinstance(e, Tokens)
    mask, masks = split_mask(a.get("attention_mask"), 0, x.shape[1])
    seen = hiding(mask)
    positions = count_positions(e, x, seen, 0)
    ctx = Dense(positions, seen=seen, masks=masks, buckets=b.transformer.buckets)
    last, states = run_blocks(b, b.transformer.embed(x, positions), ctx, bool(default(b, a, "output_hidden_states")))
    return give(BaseModelOutput(last_hidden_state=last, hidden_states=states), b, a)


def listen(b: Backbone, a: Arguments) -> Any:
    """A spectrogram's encoder; its mask is no part of what it computes."""
    assert isinstance(b.tower.embed, Frames)
    x = b.transformer.embed(a["input_features"])
    ctx = Dense(torch.arange(x.shape[1], device=x.device)[None])
    last, states = run_blocks(b, x, ctx, bool(default(b, a, "output_hidden_states")))
    return give(BaseModelOutput(last_hidden_state=last, hidden_states=states), b, a)


def decode(b: Backbone, a: Arguments) -> Any:
    e, x, cache = b.tower.embed, inputs(a), a.get(CACHE)
    assert isinstance(e, Tokens)
    if cache is None and default(b, a, "use_cache"):
        cache = EncoderDecoderCache(DynamicCache(config=b.config), DynamicCache(config=b.config))
    past, tokens = length(cache), x.shape[1]
    mask, masks = split_mask(a.get("attention_mask"), past, tokens)
    seen = hiding(mask)
    positions = a.get("position_ids")
    if positions is None:
        positions = count_positions(e, x, seen, past)
    store = None if cache is None else HfStore(cache, past, tokens, x.device, b.here)
    ctx = Dense(
        positions,
        past=past,
        seen=seen,
        masks=masks,
        store=store,
        memory=a["encoder_hidden_states"],
        memory_seen=hiding(a.get("encoder_attention_mask")),
        buckets=b.transformer.buckets,
    )
    h = b.transformer.embed(x, positions)
    last, states = run_blocks(b, h, ctx, bool(default(b, a, "output_hidden_states")))
    if store is not None:
        store.stand_in(len(b.tower.blocks), last)
    kept: dict[str, Any] = {KEPT: cache if default(b, a, "use_cache") else None}
    output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last, hidden_states=states, **kept)
    return give(output, b, a)


def unfit_for_decode(a: Arguments) -> str | None:
    cache, mask = a.get(CACHE), a.get("encoder_attention_mask")
    if a.get("encoder_hidden_states") is None:
        return "no encoder_hidden_states were given"
    if packed(a):
        return "position_ids jump within a row"
    if cache is not None and not isinstance(cache, EncoderDecoderCache):
        return f"the cache is a {type(cache).__name__}"
    return None if mask is None or mask.ndim == 2 else "encoder_attention_mask is not (batch, tokens)"


TEXT = COMMON | {"input_ids", "inputs_embeds", "attention_mask", "use_cache"}
SEQ2SEQ_ENCODER = Call(encode, TEXT)
AUDIO = Call(listen, COMMON | {"input_features", "attention_mask"})
SEQ2SEQ_DECODER = Call(
    decode,
    TEXT | {"encoder_hidden_states", "encoder_attention_mask", CACHE, "position_ids", "tokenizer"},
    unfit_for_decode,
)
