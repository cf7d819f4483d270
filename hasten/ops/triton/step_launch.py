"""How attention of a decode step is cut into programs: sizes in, a launch out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hasten.ops.triton.arrange import cdiv, power_of_2
from hasten.spec import Attention

SHORT, LONG = 1024, 4096
"""Keys up to which a sequence is read before its programs have found each other, and from which on it takes long."""


@dataclass(frozen=True, slots=True)
class StepLaunch:
    rows: int  # 1: multiplied without matrix instructions
    keys: int  # in a block
    dim: int
    splits: int  # of a sequence's keys, at most
    least: int  # keys that a split is worth
    heads: int  # that are put together at once
    ahead: int  # splits whose answers for them are read at once
    warps: int
    stages: int  # blocks on their way, and the one in use
    fetch: int  # keys behind the first block that go to the second-level cache meanwhile


@lru_cache(1024)
def step_launch(sequences: int, capacity: int, a: Attention, size: int, processors: int) -> StepLaunch:
    """Splits until four programs of four warps wait for each processor, and so that none has more than 4,096 keys.

    Where there are fewer programs than processors, and not much for them to read, it is the wait for each other that
    counts, so blocks are large and splits few. capacity: keys that a sequence's table has room for. size: bytes of a
    number, four of which no tensor core takes.
    """
    group = a.heads // a.kv_heads
    dim = max(power_of_2(a.head_dim), 16)
    few, short = sequences * a.kv_heads < processors, capacity <= SHORT
    block = _block(group, dim, size, few, few and short)
    fill = max(16 * processors // (block.warps * sequences * a.kv_heads), 1)
    most = 64 if few and capacity > LONG else 32
    splits = min(max(fill, cdiv(capacity, 4096)), cdiv(capacity, block.keys), most, 65536 // (group * dim))
    numbers = 1024 if block.rows <= 16 else 1024 // size  # a warp's, of the sums it reads at once
    heads = min(power_of_2(group), 256 * block.warps // dim)
    return StepLaunch(
        rows=block.rows,
        keys=block.keys,
        dim=dim,
        splits=splits,
        least=block.keys if few and short else cdiv(1024 // fill, block.keys) * block.keys,
        heads=heads,
        ahead=1 if splits == 1 else min(numbers * block.warps // (heads * dim), 16 if block.rows == 1 else 8),
        warps=block.warps,
        stages=block.stages,
        fetch=128 if few else 0,
    )


@dataclass(frozen=True, slots=True)
class Block:
    """How one step of a program's loop over its keys is cut: fields as in StepLaunch."""

    rows: int
    keys: int
    warps: int
    stages: int


def _block(group: int, dim: int, size: int, few: bool, waits: bool) -> Block:
    """waits: the launch is over before memory has been busy. What 16-bit numbers get was measured on an H100."""
    rows = max(power_of_2(group), 16)
    if size == 4:
        if group == 1:
            return _products(dim, size, few)
        return Block(rows, 32 if rows == 16 else 16, min(max(rows * dim // 256, 4), 16), 3)
    if group == 1 and dim <= 64:
        return Block(1, 16384 // dim, 8, 1) if waits else _products(dim, size, few)
    if group == 1 and not few:
        return _products(dim, size, few)
    if rows == 16 and waits and dim <= 128:
        # heads of their own leave most of a tile empty, and yet matrix instructions are the sooner done
        return Block(16, 32, 4, 3) if group == 1 else Block(16, 256, 8, 2) if dim <= 64 else Block(16, 64, 4, 3)
    warps = 8 if rows * dim > 2048 else 4
    return Block(rows, min(max(warps * 2048 // (dim * size), 16), 64 if rows == 16 else 32), warps, 3)


def _products(dim: int, size: int, few: bool) -> Block:
    """A single row, multiplied number by number: 64 bytes of keys a thread, and 64 of values."""
    warps = 4 if dim * size <= 128 else 8
    keys = min(warps * 2048 // (dim * size), 64)
    keys = 16 if keys == 32 else keys  # which Triton would lay out with every key in every thread
    return Block(1, keys, warps, 3 if few else 2)
