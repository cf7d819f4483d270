"""Encoders alone: BERT-like models and the text towers of CLIP-like ones, with the pooled output that some have."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from hasten import ops
from hasten.inject import captured
from hasten.inject.ahead import settle
from hasten.inject.calls.call import (
    COMMON,
    Call,
    count_positions,
    default,
    give,
    hiding,
    inputs,
    run_blocks,
    split_mask,
)
from hasten.inject.calls.pool import pool, poolers
from hasten.model import Dense
from hasten.model.packed import Packed, packable, packing
from hasten.ops.table import forced
from hasten.spec import Attention, Rope, Tokens

if TYPE_CHECKING:
    from hasten.inject.backbone import Arguments, Backbone

CROWDED = 0.9  # share of real tokens from which leaving out the others gains nothing
STEP = 64  # rows: packed batches of about the same size share a recording


def run(b: Backbone, a: Arguments) -> Any:
    x, types = inputs(a), a.get("token_type_ids")
    seen, masks = split_mask(a.get("attention_mask"), 0, x.shape[1])
    positions, kept = a.get("position_ids"), None
    if _may_pack(b) or not _reads_masks(b, x, seen):
        seen = hiding(seen)
    if default(b, a, "output_hidden_states") or masks is not None or b.watch is not None:
        settle()
        last, pooled, kept = _dense(b, a, x, positions, types, seen, masks)
    elif seen is not None and seen.shape == x.shape[:2] and _may_pack(b) and _sparse(seen):
        last = _without_padding(b, x, positions, types, seen)
        pooled = pool(b, last, x)
    else:

        def compute(x: Tensor, positions: Tensor | None, types: Tensor | None, seen: Tensor | None) -> captured.Tensors:
            return _dense(b, a, x, positions, types, seen, None)[:2]

        last, pooled = captured.run(b, compute, (x, positions, types, seen), "dense", poolers(b))
    output = BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=last,  # pyright: ignore[reportArgumentType]
        pooler_output=pooled,  # pyright: ignore[reportArgumentType]
        hidden_states=kept,
    )
    given = give(output, b, a)
    if isinstance(given, tuple) and pooled is None and b.seam.pools and "return_dict" in b.signature.parameters:
        return (given[0], None, *given[1:])  # a forward that builds its tuple itself keeps the place of what it lacks
    return given


def _may_pack(b: Backbone) -> bool:
    """Whether it was asked for, and nobody but the caller, who gave the mask, sees what stands where padding is.

    A head does: answering questions is a softmax over all positions, those of padding among them.
    """
    return b.skip_padding and b.module is b.model and packable(b.tower)


def _sparse(seen: Tensor) -> bool:
    """Whether enough of seen (batch, tokens) is padding."""
    return int(seen.sum()) < CROWDED * seen.numel()


def _reads_masks(b: Backbone, x: Tensor, mask: Tensor | None) -> bool:
    """Whether attention over x (batch, tokens, ...) takes a padding mask as it is, for next to nothing.

    Then nobody waits for the device to say whether it hides anything. To our kernel a mask of ones is no mask, bit for
    bit or, beside biases of scores, but for the last bit of roundings; torch's are other kernels with a mask, so for
    those it pays to know.
    """
    if mask is None or mask.device != x.device or b.transformer.backends:
        return False
    if forced() is not None:
        return forced() == "triton"
    dtype = x.dtype if x.is_floating_point() else b.transformer.like.dtype
    return _same_kernel(b.attentions, x.shape[1], dtype, x.device)


@lru_cache(captured.KNOWN)
def _same_kernel(attentions: frozenset[Attention], tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton's kernel is the free choice for all of these, with a mask and without."""

    def served(a: Attention) -> bool:
        q, kv = (torch.empty(1, tokens, n, a.head_dim, dtype=dtype, device=device) for n in (a.heads, a.kv_heads))
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        bias = None if isinstance(a.position, Rope | None) else mask.float()
        rows = (row for seen in (None, mask) for row in ops.attend.explain(q, kv, kv, a, seen, bias, None))
        return all(backend == "triton" for backend, why in rows if why == "chosen")

    return all(map(served, attentions))


def _positions(b: Backbone, x: Tensor, given: Tensor | None, seen: Tensor | None) -> Tensor:
    """Each token's position, (batch or 1, tokens)."""
    e = b.tower.embed
    assert isinstance(e, Tokens)
    if given is None:
        return count_positions(e, x, seen, 0)
    return given - e.position_offset if e.counted == "ids" else given  # RoBERTa's callers name rows of the table


def _dense(
    b: Backbone,
    a: Arguments,
    x: Tensor,
    positions: Tensor | None,
    types: Tensor | None,
    seen: Tensor | None,
    masks: dict[bool, Tensor | None] | None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """Last hidden state, what is pooled of it, and all hidden states if they are asked for."""
    seen = None if seen is None else seen.bool()
    positions = _positions(b, x, positions, seen)
    ctx = Dense(positions, seen=seen, masks=masks, buckets=b.transformer.buckets)
    h = b.transformer.embed(x, positions, types)
    last, states = run_blocks(b, h, ctx, bool(default(b, a, "output_hidden_states")))
    return last, pool(b, last, x), states


def _without_padding(b: Backbone, x: Tensor, positions: Tensor | None, types: Tensor | None, seen: Tensor) -> Tensor:
    """The last hidden state (batch, tokens, width) of real tokens, zeros where there is padding."""
    positions = _positions(b, x, positions, seen)
    rows = packing(seen, STEP if seen.is_cuda else 1)
    shape = seen.shape

    def compute(x: Tensor, positions: Tensor, types: Tensor | None, starts: Tensor) -> captured.Tensors:
        h = b.transformer.embed(x, positions, types)
        return (b.transformer.finish(b.transformer.blocks(h, Packed(positions, starts))),)

    own = (t if t is None else rows.pack(t.expand(shape[0], *t.shape[1:])) for t in (x, positions, types))
    (last,) = captured.run(b, compute, (*own, rows.starts), "packed", ())
    assert last is not None
    return rows.unpack(last, *shape)


def unfit(a: Arguments) -> str | None:
    mask = a.get("attention_mask")
    return "attention_mask has three axes" if getattr(mask, "ndim", 2) == 3 else None


ENCODER = Call(
    run,
    COMMON | {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "use_cache"},
    unfit,
    ahead=True,
)
