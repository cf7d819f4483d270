"""How one stored matrix packs several logical ones: pairs of inverse functions between stored and canonical rows.

Canonical rows are the parts one after the other, each part's heads contiguous. Every function takes the tensor with
rows first (a bias is one without further axes), the parts' row counts, and the unit: rows per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

Rearrange = Callable[[Tensor, Sequence[int], int], Tensor]


@dataclass(frozen=True, slots=True)
class Packing:
    name: str
    unpack: Rearrange  # stored to canonical
    pack: Rearrange  # canonical to stored


def _same(t: Tensor, sizes: Sequence[int], unit: int) -> Tensor:
    return t


def _ungroup(t: Tensor, sizes: Sequence[int], unit: int) -> Tensor:
    groups = sizes[-1] // unit
    if groups == 1:
        return t
    canonical = t.new_empty(t.shape)
    for part, share in zip(_slices(canonical, sizes, 0), _shares(t, sizes, unit), strict=True):
        part.view(share.shape).copy_(share)
    return canonical


def _group(t: Tensor, sizes: Sequence[int], unit: int) -> Tensor:
    groups = sizes[-1] // unit
    if groups == 1:
        return t
    stored = t.new_empty(t.shape)
    for part, share in zip(_slices(t, sizes, 0), _shares(stored, sizes, unit), strict=True):
        share.copy_(part.reshape(share.shape))
    return stored


def _shares(stored: Tensor, sizes: Sequence[int], unit: int) -> Sequence[Tensor]:
    """Views of each part's rows in rows that go group by group: (groups, the part's units in a group, unit, ...).

    There are as many groups as the last part has units.
    """
    groups = sizes[-1] // unit
    rows = stored.reshape(groups, -1, unit, *stored.shape[1:])
    return _slices(rows, [s // unit // groups for s in sizes], 1)


def _slices(t: Tensor, sizes: Sequence[int], axis: int) -> list[Tensor]:
    """What `split` gives, as views that autograd lets one write into."""
    ends = list(accumulate(sizes))
    return [t.narrow(axis, end - size, size) for end, size in zip(ends, sizes, strict=True)]


def _unstride(t: Tensor, sizes: Sequence[int], unit: int) -> Tensor:
    return torch.cat([t[i :: len(sizes)] for i in range(len(sizes))])


def _stride(t: Tensor, sizes: Sequence[int], unit: int) -> Tensor:
    return torch.stack(t.chunk(len(sizes)), 1).reshape(t.shape)


_BLOCKS = 4  # model-parallel blocks that CodeGen was trained with


def _from_blocks(t: Tensor, sizes: Sequence[int], unit: int) -> Tensor:
    q, v, k = t.reshape(_BLOCKS, 3, -1, *t.shape[1:]).unbind(1)
    return torch.stack((q, k, v)).reshape(t.shape)


def _to_blocks(t: Tensor, sizes: Sequence[int], unit: int) -> Tensor:
    q, k, v = t.reshape(3, _BLOCKS, -1, *t.shape[1:]).unbind()
    return torch.stack((q, v, k), 1).reshape(t.shape)


SEQUENTIAL = Packing("sequential", _same, _same)
GROUPED = Packing("grouped", _ungroup, _group)  # GPT-NeoX, BLOOM, Falcon, Megatron 2 and 3
STRIDED = Packing("strided", _unstride, _stride)  # q0 k0 v0 q1 k1 v1 ...: Megatron 1; gate and up of GPT-OSS
BLOCKED = Packing("blocked", _from_blocks, _to_blocks)  # q v k per block: CodeGen
