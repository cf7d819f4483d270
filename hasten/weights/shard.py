"""Which part of a tower, and of each of its parameters, one of several processes holds.

A rank's share of a tower is a tower with fewer heads and narrower mlps, and its share of a parameter follows from the
parameter's role. Experts are split inside, each like an mlp, or whole, each rank holding some of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from math import gcd
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import ConfigError
from hasten.spec import Alibi, Attention, Block, Mlp, Moe, Tower
from hasten.weights.plan import Param

Split = Literal["inside", "whole"]
"""How experts are divided."""


def sizes(t: Tower, experts: Split = "inside") -> list[int]:
    """Every number of ranks among which the tower can be divided."""
    most = max((n for b in t.blocks for _, n, kind in _counts(b, experts) if kind == "even"), default=1)
    return [n for n in range(1, most + 1) if not _problems(t, n, experts)]


def check(t: Tower, size: int, experts: Split = "inside") -> None:
    """ConfigError unless the tower can be divided among `size` ranks: all that stands in the way, and what would do."""
    if problems := _problems(t, size, experts):
        listed, would = "\n  ".join(problems), ", ".join(map(str, sizes(t, experts)))
        raise ConfigError(f"the model cannot be divided among {size} ranks (it can among {would}):\n  {listed}")


def _problems(t: Tower, size: int, experts: Split) -> list[str]:
    blocks: dict[str, list[int]] = {}
    for i, b in enumerate(t.blocks):
        for what, n, kind in _counts(b, experts):
            if n % size and (kind == "even" or size % n):
                blocks.setdefault(f"{n} {what}", []).append(i)
    return [f"{what} in block{'s' if len(at) > 1 else ''} {_ranges(at)}" for what, at in blocks.items()]


def _counts(b: Block, experts: Split) -> Iterator[tuple[str, int, Literal["even", "copied"]]]:
    """What a block has to divide: its name, how many there are, and whether ranks may also hold copies of the same."""
    for a, which in ((b.attention, ""), (b.cross, "cross ")):
        if a is not None:
            yield f"{which}attention heads", a.heads, "even"
            yield f"{which}key-value heads", a.kv_heads, "copied"
    if isinstance(b.mlp, Mlp):
        yield "columns of the mlp", b.mlp.width, "even"
        return
    yield (
        ("experts", b.mlp.experts, "even")
        if experts == "whole"
        else ("columns of an expert", b.mlp.expert.width, "even")
    )
    if b.mlp.shared is not None:
        yield "columns of the shared expert", b.mlp.shared.width, "even"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as `0-2, 5`."""
    starts = [n for k, n in enumerate(numbers) if not k or numbers[k - 1] != n - 1]
    stops = [n for k, n in enumerate(numbers) if k == len(numbers) - 1 or numbers[k + 1] != n + 1]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))


def local(t: Tower, rank: int, size: int, experts: Split = "inside") -> Tower:
    """What rank `rank` of `size` computes. Its vocabulary is the whole one: a table may have fewer rows (`shard`)."""
    check(t, size, experts)
    return replace(t, blocks=tuple(_block(b, rank, size, experts) for b in t.blocks))


def _block(b: Block, rank: int, size: int, experts: Split) -> Block:
    cross = None if b.cross is None else _attention(b.cross, rank, size)
    mlp = _mlp(b.mlp, size) if isinstance(b.mlp, Mlp) else _moe(b.mlp, rank, size, experts)
    return replace(b, attention=_attention(b.attention, rank, size), cross=cross, mlp=mlp)


def _attention(a: Attention, rank: int, size: int) -> Attention:
    heads, p = a.heads // size, a.position
    if isinstance(p, Alibi) and size > 1:
        p = replace(p, among=(rank * heads, a.heads))
    return replace(a, heads=heads, kv_heads=max(a.kv_heads // size, 1), position=p)


def _mlp(m: Mlp, size: int) -> Mlp:
    return replace(m, width=m.width // size)


def _moe(m: Moe, rank: int, size: int, experts: Split) -> Moe:
    shared = None if m.shared is None else _mlp(m.shared, size)
    if experts == "whole" and size > 1:
        here = m.experts // size
        return replace(m, shared=shared, held=(rank * here, here))
    return replace(m, shared=shared, expert=_mlp(m.expert, size))


def shard(p: Param, t: Tensor, rank: int, size: int, experts: Split = "inside") -> Tensor:
    """The share that rank `rank` of `size` holds of a canonical tensor: a view of it wherever one slice is all.

    `p` is the whole tower's. A vocabulary is padded with zeros to as many rows on every rank.
    """
    divided = split_of(p, experts)
    if divided is None or size == 1:
        return t
    axis, parts, unit = divided
    if p.role == "vocab":
        rows = _rows(p, size)
        own = t[rank * rows : (rank + 1) * rows]
        return own if len(own) == rows else F.pad(own, (0, 0) * (t.ndim - 1) + (0, rows - len(own)))
    own = []
    for end, n in zip(accumulate(parts), parts, strict=True):
        first, length = _own(n // unit, rank, size)
        own.append(t.narrow(axis, end - n + first * unit, length * unit))
    return own[0] if len(own) == 1 else torch.cat(own, axis)


def join(p: Param, shares: Sequence[Tensor], experts: Split = "inside") -> Tensor:
    """The canonical tensor of which these are the shares of all ranks, in their order."""
    divided, size = split_of(p, experts), len(shares)
    if divided is None or size == 1:
        return shares[0]
    axis, parts, unit = divided
    if p.role == "vocab":
        return torch.cat(list(shares))[: sum(parts)]
    held = [_own(n // unit, 0, size)[1] * unit for n in parts]  # by every rank
    split = [s.split(held, axis) for s in shares]
    each = [torch.cat([s[k] for s in split[:: max(size * unit // n, 1)]], axis) for k, n in enumerate(parts)]
    return each[0] if len(each) == 1 else torch.cat(each, axis)


def share(p: Param, size: int, experts: Split = "inside") -> Param:
    """The parameter of which every one of `size` ranks holds one: `shard` gives tensors of its shape."""
    divided = split_of(p, experts)
    if divided is None or size == 1:
        return p
    axis, parts, unit = divided
    if p.role == "vocab":
        return replace(p, parts=(_rows(p, size),))
    held = tuple(_own(n // unit, 0, size)[1] * unit for n in parts)
    if p.stack and axis == 0:
        return replace(p, stack=held[0])
    if axis == -1:
        return replace(p, columns=(*p.columns[:-1], *held))
    return replace(p, parts=(1,) * held[0] if len(p.parts) > 1 and p.role == "heads" else held)


def is_split(p: Param, experts: Split = "inside") -> bool:
    """Whether ranks hold different shares of the parameter."""
    return split_of(p, experts) is not None


def split_of(p: Param, experts: Split) -> tuple[int, tuple[int, ...], int] | None:
    """The axis along which ranks divide a parameter, the lengths of its parts there, and what stays together.

    None: every rank holds all of it.
    """
    if p.stack and experts == "whole":
        return 0, (p.stack,), 1
    match p.role:
        case "rows" | "vocab":
            return 0, p.parts, p.unit
        case "expert_rows":
            return 1, p.parts, p.unit
        case "heads":
            return 0, (sum(p.parts),), p.unit
        case "columns" | "expert_columns" | "heads_table":
            return -1, p.columns[-1:], p.unit
        case "replicated":
            return None


def _own(units: int, rank: int, size: int) -> tuple[int, int]:
    """The first of the units that a rank holds, and how many; where there are too few, ranks hold copies of one."""
    if gcd(units, size) != min(units, size):
        raise ValueError(f"{units} units cannot be divided among {size} ranks")
    return rank * units // size, max(units // size, 1)


def _rows(p: Param, size: int) -> int:
    """Rows of a vocabulary's table on every rank."""
    return -(-sum(p.parts) // size)
