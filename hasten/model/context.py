"""What a block needs to know about the batch it is in; it never sees a cache, a mask or a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten import ops
from hasten.ops import Reach, Slots
from hasten.spec import Alibi, Attention, Buckets, Dynamic, LongRope, Rope

KeysAndValues = Callable[[Tensor], tuple[Tensor, Tensor]]


class Context(Protocol):
    positions: Tensor  # int, in the shape of the tokens

    def turn(self, r: Rope) -> tuple[Tensor, Tensor]:
        """cos and sin of every token, float32 (..., r.dim / 2)."""
        ...

    def slots(self, i: int) -> Slots | None:
        """Where layer i keeps its keys and values, if it keeps them in pages."""
        ...

    def reach(self, a: Attention) -> Reach | None:
        """What `attend` looks back at in those pages, if `attend_pages` is all that it does.

        Then the pools of all layers are contiguous, of one dtype, and their pages of one size.
        """
        ...

    def attend(
        self, i: int, a: Attention, q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """Keep k and v for layer i, unless its slots have them, and attend over all kept: (..., heads, head_dim)."""
        ...

    def attend_memory(self, i: int, a: Attention, q: Tensor, make: KeysAndValues) -> Tensor:
        """Attend over the encoder's output, whose keys and values `make` gives, at most once per layer and memory."""
        ...


class Store(Protocol):
    """Keeps keys and values between calls, (batch, tokens, kv_heads, head_dim)."""

    def update(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Append for layer i: all that are kept, and the index in the sequence of the first of them."""
        ...

    def remember(self, i: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The memory's keys and values for layer i, made at the first call."""
        ...


class Dense:
    """A rectangular batch (batch, tokens), with or without a store of what came before.

    past: tokens of the sequence before these. seen (batch, past + tokens): False for padding. mask: a visibility that
    the caller made himself, bool or additive, (batch or 1, heads or 1, tokens, keys), by whether a layer has a window;
    it replaces causality, window and `seen`; layers with a window narrow the others' mask if they have none.
    memory (batch, memory tokens, width) and memory_seen: an encoder's output.
    biases(i): what the caller adds to the scores of layer i, float32 (batch or 1, heads, tokens, keys).
    """

    def __init__(
        self,
        positions: Tensor,
        *,
        past: int = 0,
        seen: Tensor | None = None,
        masks: dict[bool, Tensor | None] | None = None,
        store: Store | None = None,
        memory: Tensor | None = None,
        memory_seen: Tensor | None = None,
        buckets: Tensor | None = None,
        biases: Callable[[int], Tensor | None] | None = None,
    ) -> None:
        self.positions, self.past, self.seen, self.masks = positions, past, seen, masks
        self.store, self.memory, self.memory_seen, self.buckets = store, memory, memory_seen, buckets
        self.biases = biases
        self._made: dict[object, tuple[Tensor, Tensor] | Tensor | None] = {}

    def turn(self, r: Rope) -> tuple[Tensor, Tensor]:
        if r not in self._made:
            grows = isinstance(r.scaling, Dynamic | LongRope)  # only these need the length, which costs a sync
            length = int(self.positions.max()) + 1 if grows else 0
            self._made[r] = ops.rope_table(r, self.positions, length)
        return self._made[r]  # pyright: ignore[reportReturnType]

    def slots(self, i: int) -> Slots | None:
        return None

    def reach(self, a: Attention) -> Reach | None:
        return None

    def attend(
        self, i: int, a: Attention, q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        assert k is not None and v is not None, "a dense context has no slots"
        first = 0
        if self.store is not None:
            k, v, first = self.store.update(i, k, v)
        sizes = q.shape[1], k.shape[1], first
        mask, bias = self._visible(a, *sizes), self._bias(a, *sizes)
        extra = None if self.biases is None else self.biases(i)
        bias = extra if bias is None else bias if extra is None else bias + extra
        if mask is not None and mask.is_floating_point():
            mask, bias = None, mask if bias is None else bias + mask
        return ops.attend(q, k, v, a, mask, bias, sinks)

    def attend_memory(self, i: int, a: Attention, q: Tensor, make: KeysAndValues) -> Tensor:
        def keys_and_values() -> tuple[Tensor, Tensor]:
            assert self.memory is not None, "a block with cross attention needs a memory"
            return make(self.memory)

        k, v = keys_and_values() if self.store is None else self.store.remember(i, keys_and_values)
        mask = None if self.memory_seen is None else self.memory_seen[:, None, None, :]
        return ops.attend(q, k, v, a, mask, None, None)

    def _visible(self, a: Attention, queries: int, keys: int, first: int) -> Tensor | None:
        """(batch or 1, 1, queries, keys), bool or the caller's additive one; None where every query sees every key."""
        masks, windowed = self.masks or {}, a.window is not None
        ready = masks.get(windowed, masks.get(False))
        if ready is not None:
            ready = ready[..., -keys:] if first else ready[..., :keys]
            return self._narrow(ready, a.window, first) if a.window is not None and True not in masks else ready
        tag = ("mask", a.causal, a.window, keys, first)
        if tag not in self._made:
            self._made[tag] = self._make_visible(a, queries, keys, first)
        return self._made[tag]  # pyright: ignore[reportReturnType]

    def _make_visible(self, a: Attention, queries: int, keys: int, first: int) -> Tensor | None:
        where, mask = self.positions.device, None
        if a.causal and (queries > 1 or first + keys > self.past + 1):
            mask = self._ago(queries, keys, first, where) >= 0
        if a.causal and a.window is not None and self.past + queries - first > a.window:
            inside = self._ago(queries, keys, first, where) < a.window
            mask = inside if mask is None else mask & inside
        if self.seen is not None:
            seen = self.seen[:, first : first + keys]
            if seen.shape[1] < keys:  # a static cache is longer than what has been said so far
                seen = torch.cat((seen, seen.new_ones(len(seen), keys - seen.shape[1])), 1)
            seen = seen[:, None, :]
            mask = seen if mask is None else mask & seen
        if mask is None:
            return None
        return mask.unsqueeze(1) if mask.ndim == 3 else mask[None, None]

    def _narrow(self, ready: Tensor, window: int, first: int) -> Tensor:
        """A caller's mask without the keys that the window hides."""
        queries, keys = ready.shape[-2:]
        hidden = self._ago(queries, keys, first, ready.device) >= window
        return ready.masked_fill(hidden, False if ready.dtype == torch.bool else torch.finfo(ready.dtype).min)

    def _ago(self, queries: int, keys: int, first: int, where: torch.device) -> Tensor:
        """How many tokens before each query each key lies, (queries, keys)."""
        here = torch.arange(self.past, self.past + queries, device=where).unsqueeze(-1)
        return here - torch.arange(first, first + keys, device=where)

    def _bias(self, a: Attention, queries: int, keys: int, first: int) -> Tensor | None:
        """float32 (batch or 1, heads, queries, keys), or None."""
        p = a.position
        if p is None or isinstance(p, Rope):
            return None
        tag = ("bias", p, a.heads, keys, first)
        if tag not in self._made:
            ago = self._ago(queries, keys, first, self.positions.device)
            if isinstance(p, Buckets):
                assert self.buckets is not None, "attention by distance buckets needs their table"
                self._made[tag] = self.buckets[ops.bucket(-ago, p)].permute(2, 0, 1)[None].float()
            else:
                self._made[tag] = self._alibi(p, a, ago, first)
        return self._made[tag]  # pyright: ignore[reportReturnType]

    def _alibi(self, p: Alibi, a: Attention, ago: Tensor, first: int) -> Tensor:
        slopes = ops.alibi_slopes(p, a.heads).to(ago.device)
        if p.bf16:  # rounding is not blind to a shift, so count as the original does: keys from the first real token
            keys = torch.arange(first, first + ago.shape[1], device=ago.device)[None]
            if self.seen is not None:
                counted = ((self.seen.cumsum(-1) - 1) * self.seen)[:, first : first + ago.shape[1]]
                keys = F.pad(counted, (0, ago.shape[1] - counted.shape[1]))  # a static cache is longer
            bias = (slopes.bfloat16()[:, None] * keys[:, None, :]).float()[:, :, None, :]
        else:
            bias = -slopes[None, :, None, None] * ago
        return bias * a.scale if p.scaled else bias
