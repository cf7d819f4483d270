"""transformers' Cache objects as the store of a dense context."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

CACHE = "cache"  # the name under which our own calls know it
SPELLINGS = (CACHE, "past_key_values")
"""What transformers calls a cache, in the forwards that take one and in the outputs that hold one."""

BY_POSITION = "cache_position" in inspect.signature(Cache.get_mask_sizes).parameters  # transformers 4


class HfStore:
    """Appends `count` tokens behind `past` ones to each layer of a Cache, of whatever kind it is.

    here: which of the cache's layers are the store's, counted from 0 again.
    """

    def __init__(self, cache: Any, past: int, count: int, device: torch.device, here: range) -> None:
        self.cache, self.count, self.here = cache, count, here
        self.kept: Any = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        self.where = torch.arange(past, past + count, device=device)

    def update(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        i = self.here[i]
        _, first = self.kept.get_mask_sizes(self.where if BY_POSITION else self.count, i)
        arguments = {"cache_position": self.where}
        keys, values = self.kept.update(k.transpose(1, 2), v.transpose(1, 2), i, arguments)
        return keys.transpose(1, 2), values.transpose(1, 2), int(first)

    def remember(self, i: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if not isinstance(self.cache, EncoderDecoderCache):
            return make()
        i = self.here[i]
        crossed: Any = self.cache.cross_attention_cache
        if self.cache.is_updated.get(i):
            return crossed.layers[i].keys.transpose(1, 2), crossed.layers[i].values.transpose(1, 2)
        k, v = make()
        crossed.update(k.transpose(1, 2), v.transpose(1, 2), i)
        self.cache.is_updated[i] = True
        return k, v

    def stand_in(self, layers: int, like: Tensor) -> None:
        """Give the layers that another stage keeps, of so many, entries as long as the others, with nothing in them.

        like (batch, tokens, ...): of the dtype and on the device of keys. transformers reads a cache's length off them.
        """
        for i in (i for i in range(layers) if i not in self.here):
            held: Any = getattr(self.kept.layers[i], "keys", None) if i < len(self.kept.layers) else None
            there = isinstance(held, Tensor) and held.ndim == 4
            heads, dim = (held.shape[1], held.shape[3]) if there else (1, 1)
            nothing = like.new_zeros(1).expand(len(like), heads, self.count, dim)
            self.kept.update(nothing, nothing, i, {"cache_position": self.where})


def length(cache: Cache | None) -> int:
    """Tokens that a cache holds already."""
    return 0 if cache is None else int(cache.get_seq_length())


def heads(cache: Any) -> dict[int, tuple[int, int]]:
    """Key-value heads and their width in each layer that a cache holds something of, as far as it tells."""
    kept = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    keys: list[Any] = [getattr(layer, "keys", None) for layer in getattr(kept, "layers", ())]
    return {i: (k.shape[1], k.shape[3]) for i, k in enumerate(keys) if isinstance(k, Tensor) and k.ndim == 4}


def spelled(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments with its cache under `CACHE`, however the forward spells it; two of them stay apart."""
    given = [n for n in SPELLINGS if n in arguments]
    return arguments if len(given) != 1 else {CACHE if [n] == given else n: v for n, v in arguments.items()}


def field(output: type[Any]) -> str:
    """The field of a class of outputs that holds the cache."""
    return next(f.name for f in fields(output) if f.name in SPELLINGS)
