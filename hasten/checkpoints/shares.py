"""What one of several ranks reads of a checkpoint: of what they divide, its own share and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hasten.checkpoints.copying import Copies
from hasten.checkpoints.source import Source
from hasten.weights import Binding, Split, fetch, portion, shard, share, stored, views


@dataclass(frozen=True, slots=True)
class Reader:
    """Rank `rank` of `size`, which keeps shares on `device` of the parameters that `divides` names.

    away: names of the model's tensors of which it keeps nothing. silent: another one tells how far reading has come.
    """

    rank: int
    size: int
    experts: Split
    device: torch.device
    divides: Callable[[Binding], bool]
    away: frozenset[str] = frozenset()
    silent: bool = False


def new_share(b: Binding, who: Reader, dtype: torch.dtype) -> Tensor:
    """Memory for a share; zero where nothing will be read."""
    p = share(b.param, who.size, who.experts)
    make = torch.zeros if p.role == "vocab" or any(p.absent) else torch.empty
    return make(p.shape, dtype=dtype, device=who.device)


def read_share(own: Tensor, theirs: Binding, source: Source, who: Reader, copy: Copies) -> None:
    """Read a share into `own`: slices straight to their places where a few of them are all, else made of the whole.

    theirs: the parameter under the source's names, in the source's layout.
    """
    found = portion(theirs, who.rank, who.size, who.experts) if _as_described(theirs, source) else None
    if found is None:
        give_share(own, theirs, {k: source.read(k) for k in theirs.keys}, who, copy)
        return
    b, own = found.binding, own[: found.binding.param.shape[0]]
    seen = views(b, own)
    if seen is None:
        copy(own, fetch(b, {k: s.of(partial(source.read, k)) for k, s in found.slices.items()}))
        copy.wait()
        return
    for k, view in zip(b.keys, seen, strict=True):
        slices, at = found.slices[k], 0
        for index in slices.parts:
            t = source.read(k, index)
            n = t.shape[slices.axis]
            copy(view.narrow(slices.axis, at, n), t)
            at += n


def give_share(own: Tensor, b: Binding, whole: Mapping[str, Tensor], who: Reader, copy: Copies) -> None:
    """The share of stored tensors that are there as a whole."""
    copy(own, shard(b.param, fetch(b, whole), who.rank, who.size, who.experts))
    copy.wait()


def _as_described(b: Binding, source: Source) -> bool:
    """Whether every stored tensor has the very shape that is expected; a vocabulary may have rows of padding."""
    expected = stored(b, torch.empty(b.param.shape, device="meta"))
    first = 1 if b.param.role == "vocab" else 0
    return all(source.entries[k].shape[first:] == t.shape[first:] for k, t in zip(b.keys, expected, strict=True))
