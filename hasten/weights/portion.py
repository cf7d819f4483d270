"""Which part of its stored tensors a rank needs for its share of a parameter, so that it reads no more than that.

Nothing here knows of layouts: stored tensors that hold the numbers of their own elements are fetched and sharded as
the real ones would be, and the numbers that come out say what is needed of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hasten.weights.fetch import Binding, fetch, stored
from hasten.weights.plan import Param
from hasten.weights.shard import Split, shard, share, split_of

Index = tuple[slice, ...]
MOST = 8
"""Slices of one tensor that are read one by one; where there would be more, all of it is read."""


@dataclass(frozen=True, slots=True)
class Slices:
    """Parts of one stored tensor, which go behind each other along `axis`."""

    axis: int
    parts: tuple[Index, ...]

    def of(self, read: Callable[[Index], Tensor]) -> Tensor:
        found = [read(i) for i in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, self.axis)


@dataclass(frozen=True, slots=True)
class Portion:
    """`binding` is of the share alone: fetched from these slices of the stored tensors it gives what `shard` would.

    Of a vocabulary's last share there may be fewer rows.
    """

    binding: Binding
    slices: Mapping[str, Slices]


def portion(b: Binding, rank: int, size: int, experts: Split = "inside") -> Portion | None:
    """What rank `rank` of `size` reads; None where a few slices are not all: then it reads whole tensors."""
    own = share(b.param, size, experts)
    if b.param.role == "vocab":
        first, last = (min(n * own.shape[0], b.param.shape[0]) for n in (rank, rank + 1))
        rows = replace(own, parts=(last - first,))
        return Portion(replace(b, param=rows), dict.fromkeys(b.keys, Slices(0, ((slice(first, last),),))))
    small = replace(b, param=_thin(b.param, experts))
    ids, at = dict[str, Tensor](), 1  # 0 is what has no source
    for k, t in zip(b.keys, stored(small, torch.empty(small.param.shape, device="meta")), strict=True):
        ids[k] = torch.arange(at, at + t.numel()).view(t.shape)
        at += t.numel()
    wanted = shard(small.param, fetch(small, ids), rank, size, experts)
    needed = torch.zeros(at, dtype=torch.bool).index_fill(0, wanted.flatten(), True)
    found = {k: _slices(needed[t]) for k, t in ids.items() if needed[t].any()}
    slices = {k: s for k, s in found.items() if s is not None}
    local = Binding(share(small.param, size, experts), tuple(slices), b.dialect)
    if len(slices) < len(found) or not _gives(local, {k: s.of(ids[k].__getitem__) for k, s in slices.items()}, wanted):
        return None
    return Portion(Binding(own, tuple(slices), b.dialect), slices)


def _thin(p: Param, experts: Split) -> Param:
    """The parameter with every axis that ranks do not divide as short as it can be."""
    divided = split_of(p, experts)
    ones: dict[str, Any] = {"parts": (1,) * len(p.parts), "columns": (1,) * len(p.columns)}
    if divided is None or (p.stack and divided[0] == 0):
        return replace(p, **ones)
    return replace(p, **({"parts": ones["parts"]} if divided[0] == -1 else {"columns": ones["columns"]}))


def _slices(found: Tensor) -> Slices | None:
    """The slices of booleans that hold all that are True, and no other; None where no few slices do."""
    axes = range(found.ndim)
    runs = [_runs(found if found.ndim == 1 else found.movedim(i, 0).flatten(1).any(1)) for i in axes]
    axis = max(axes, key=lambda i: len(runs[i]))
    if any(len(r) > 1 for i, r in enumerate(runs) if i != axis) or len(runs[axis]) > MOST:
        return None
    parts = []
    for run in runs[axis]:
        ends = [run if i == axis else each[0] for i, each in enumerate(runs)]
        index = [slice(None) if end == (0, n) else slice(*end) for end, n in zip(ends, found.shape, strict=True)]
        if not bool(found[tuple(index)].all()):
            return None
        while index and index[-1] == slice(None):
            index.pop()
        parts.append(tuple(index))
    return Slices(axis, tuple(parts))


def _runs(found: Tensor) -> list[tuple[int, int]]:
    """Where the True ones among booleans begin and end."""
    edges = torch.diff(found.int(), prepend=found.new_zeros(1).int(), append=found.new_zeros(1).int())
    return list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True))


def _gives(b: Binding, tensors: Mapping[str, Tensor], wanted: Tensor) -> bool:
    try:
        return torch.equal(fetch(b, tensors), wanted)
    except (RuntimeError, ValueError):  # rows of which the packing can make nothing
        return False


def views(b: Binding, canonical: Tensor) -> list[Tensor] | None:
    """The stored tensors as views of the canonical memory; None where the layout has no such views."""
    empty = torch.empty_like(canonical, device="meta")
    return stored(b, canonical) if all(t is empty or t._base is empty for t in stored(b, empty)) else None
