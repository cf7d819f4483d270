"""Decoders alone: GPT-like models with their key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

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
from hasten.spec import Tokens

if TYPE_CHECKING:
    from hasten.inject.backbone import Arguments, Backbone


@dataclass
class DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    router_logits: tuple[Tensor, ...] | None = None  # heads of mixtures of experts look for it


KEPT = field(DecoderOutput)


def run(b: Backbone, a: Arguments) -> Any:
    e, x, cache = b.tower.embed, inputs(a), a.get(CACHE)
    assert isinstance(e, Tokens)
    if cache is None and default(b, a, "use_cache"):
        cache = DynamicCache(config=b.config)
    past, tokens = length(cache), x.shape[1]
    mask, masks = split_mask(a.get("attention_mask"), past, tokens)
    seen = hiding(mask)
    if masks is not None and b.seam.windows == "beside masks":
        masks = {False: masks[False]}
    positions = a.get("position_ids")
    if positions is None:
        positions = count_positions(e, x, seen, past)
    store = None if cache is None else HfStore(cache, past, tokens, x.device, b.here)
    ctx = Dense(positions, past=past, seen=seen, masks=masks, store=store, buckets=b.transformer.buckets)
    table = b.module.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    scaled = isinstance(table, nn.Embedding) and type(table) is not nn.Embedding  # a table that scales: vectors are
    h = b.transformer.embed(x, positions, scaled=scaled)
    last, states = run_blocks(b, h, ctx, bool(default(b, a, "output_hidden_states")))
    if store is not None:
        store.stand_in(len(b.tower.blocks), last)
    kept: dict[str, Any] = {KEPT: cache if default(b, a, "use_cache") else None}
    return give(DecoderOutput(last_hidden_state=last, hidden_states=states, **kept), b, a)


def unfit(a: Arguments) -> str | None:
    if getattr(a.get("input_ids"), "ndim", 2) > 2:  # families disagree on the shape of the answer
        return "input_ids have more than two axes"
    if packed(a):
        return "position_ids jump within a row"
    cache = a.get(CACHE)
    return None if cache is None or isinstance(cache, Cache) else f"the cache is a {type(cache).__name__}"


DECODER = Call(
    run,
    # generate() hands its tokenizer on, of which no forward makes anything
    COMMON | {"input_ids", "inputs_embeds", "attention_mask", "position_ids", CACHE, "use_cache", "tokenizer"},
    unfit,
)
