"""Tensors that lie as runs of elements in flat ones: views where they lie in one, gathered only when they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hasten.checkpoints.joining import Share
from hasten.checkpoints.source import Entry


@dataclass(frozen=True, slots=True)
class Run:
    """Elements `start:stop` of a flat tensor."""

    flat: Tensor
    start: int
    stop: int


def cut(flats: Sequence[Tensor], start: int, stop: int) -> list[Run]:
    """The runs in which elements `start:stop` of all of `flats`, one behind the other, lie."""
    ends = accumulate(t.numel() for t in flats)
    spans = [(t, end - t.numel(), end) for t, end in zip(flats, ends, strict=True)]
    return [Run(t, max(start, low) - low, min(stop, end) - low) for t, low, end in spans if low < stop and start < end]


def share(runs: Sequence[Run], shape: tuple[int, ...], file: str) -> Share:
    """The tensor of that shape whose elements, in their order, are those of the runs."""
    dtype = runs[0].flat.dtype if runs else torch.float32
    return Share(Entry(shape, dtype, file), lambda index: _read(runs, shape, dtype, index))


def _read(runs: Sequence[Run], shape: tuple[int, ...], dtype: torch.dtype, index: tuple[slice, ...]) -> Tensor:
    if not index:
        return _gather(runs, 0, math.prod(shape), dtype).view(shape)
    low, high, _ = index[0].indices(shape[0])
    rows = max(high - low, 0)
    width = math.prod(shape[1:])
    return _gather(runs, low * width, (low + rows) * width, dtype).view(rows, *shape[1:])[(slice(None), *index[1:])]


def _gather(runs: Sequence[Run], start: int, stop: int, dtype: torch.dtype) -> Tensor:
    at, wanted = 0, []
    for run in runs:
        end = at + run.stop - run.start
        low, high = max(start, at), min(stop, end)
        if low < high:
            wanted.append(run.flat[run.start + low - at : run.start + high - at])
        at = end
    if len(wanted) == 1:
        return wanted[0]
    return torch.cat(wanted) if wanted else torch.empty(0, dtype=dtype)
