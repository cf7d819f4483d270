"""The pieces that calls of every kind share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from hasten.errors import RequestError
from hasten.inject.hf_cache import CACHE
from hasten.model import Dense
from hasten.spec import Tokens

if TYPE_CHECKING:
    from hasten.inject.backbone import Arguments, Backbone

COMMON = frozenset({"output_hidden_states", "return_dict", "output_attentions", "cache_position"})


@dataclass(frozen=True, slots=True)
class Call:
    """`run` serves arguments whose names are all in `knows`, unless `unfit` says why not.

    Any other call goes to the model's own forward; `hidden` finds the last hidden state (batch, tokens, width) in what
    that gives. ahead: `run` may begin before the call's checks are settled, and settles them itself.
    """

    run: Callable[[Backbone, Arguments], Any]
    knows: frozenset[str]
    unfit: Callable[[Arguments], str | None] = lambda a: None
    hidden: Callable[[Backbone, Any], Tensor] = lambda b, output: output[0]
    ahead: bool = False


def inputs(a: Arguments) -> Tensor:
    """Token ids (batch, tokens), or vectors (batch, tokens, width): exactly one of both."""
    ids, embeds = a.get("input_ids"), a.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise RequestError("give exactly one of input_ids and inputs_embeds")
    if ids is None:
        return cast(Tensor, embeds)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise RequestError(f"input_ids must be integers, got {ids.dtype}")
    return ids.view(-1, ids.shape[-1])


def default(b: Backbone, a: Arguments, name: str) -> Any:
    """An argument, else the config's field of that name."""
    value = a.get(name)
    return getattr(b.config, name, None) if value is None else value


def count_positions(e: Tokens, x: Tensor, seen: Tensor | None, past: int) -> Tensor:
    """The positions (batch or 1, tokens) that transformers gives tokens where the caller gives none."""
    tokens = x.shape[1]
    if e.counted == "ids" and not x.is_floating_point():
        real = (x != e.padding).long()
        return (real.cumsum(1) + past) * real - 1
    if e.counted == "mask" and seen is not None:
        real = seen.long()
        return (real.cumsum(1) * real - 1)[:, past:]
    return torch.arange(past, past + tokens, device=x.device)[None]


def packed(a: Arguments) -> bool:
    """Whether a row's position_ids jump in a call without mask and cache: most models then see several texts in it."""
    positions = a.get("position_ids")
    if positions is None or a.get("attention_mask") is not None or a.get(CACHE) is not None:
        return False
    return a.get("use_cache") is not True and bool((positions.diff(dim=-1) != 1).any())


def split_mask(mask: Any, past: int, tokens: int) -> tuple[Tensor | None, dict[bool, Tensor | None] | None]:
    """A caller's attention_mask as (its rows (batch, past + tokens), 0 at padding) and ready masks by window."""
    if mask is None:
        return None, None
    if isinstance(mask, dict):
        return None, {False: mask.get("full_attention"), True: mask.get("sliding_attention")}
    if mask.ndim == 4:
        return None, {False: mask, True: mask}
    if mask.ndim != 2:
        raise RequestError(
            f"attention_mask must be (batch, tokens) or (batch, heads, queries, keys), got {tuple(mask.shape)}"
        )
    if mask.shape[1] < past + tokens:
        raise RequestError(
            f"attention_mask covers {mask.shape[1]} tokens; there are {past} cached and {tokens} new ones"
        )
    return mask, None


def hiding(mask: Tensor | None) -> Tensor | None:
    """The mask as bool, or None where it hides nothing: attention has faster kernels then, and the device is asked."""
    if mask is None:
        return None
    seen = mask.bool()
    return None if bool(seen.all()) else seen


def run_blocks(b: Backbone, x: Tensor, ctx: Dense, states: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The finished last hidden state, and all of them if asked for, as the seam says."""
    kept: list[Tensor] = []
    t = b.transformer
    if b.watch is not None:
        b.watch.blocks(x, ctx)
    raw = t.blocks(x, ctx, (lambda i, h: kept.append(h)) if states else None)
    last = t.finish(raw)
    if b.watch is not None:
        b.watch.last["fused"] = last
    listed = "output_hidden_states" in b.signature.parameters
    normed = b.seam.states == "normed" or (b.seam.states == "either" and not listed)
    return last, (*kept, last if normed else raw) if states else None


def give(output: ModelOutput, b: Backbone, a: Arguments) -> Any:
    """The output, or a tuple of it where the caller or the config wants one."""
    wanted = a.get("return_dict")
    if wanted is None:
        wanted = getattr(b.config, "return_dict", True)
    return output if wanted else output.to_tuple()
