"""How one stored matrix packs several logical ones: pairs of inverse functions between stored and canonical rows.

Canonical rows are the parts one after the other, each part's heads contiguous. Every function takes the tensor with
rows first (a bias is one without further axes), the parts' row counts, and the unit: rows per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    # group by group: its share of every part, in units; groups are the units of the last part
    groups = sizes[-1] // unit
    if groups == 1:
        return t
    rows = t.reshape(groups, -1, unit, *t.shape[1:])
    shares = [s // unit // groups for s in sizes]
    return torch.cat([p.reshape(-1, *t.shape[1:]) for p in rows.split(shares, 1)])


def _group(t: Tensor, sizes: Sequence[int], unit: int) -> Tensor:
    groups = sizes[-1] // unit
    if groups == 1:
        return t
    parts = [p.reshape(groups, -1, unit, *t.shape[1:]) for p in t.split(list(sizes))]
    return torch.cat(parts, 1).reshape(t.shape)


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
