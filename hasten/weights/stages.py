"""Which blocks and parameters of a tower each of several processes holds that stand one behind the other.

A stage's tower is the tower with fewer blocks, counted from 0 again, so that whatever runs a tower runs a stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import prod

from torch import Tensor

from hasten.errors import ConfigError
from hasten.spec import Moe, Tower
from hasten.weights.plan import Param, params

Cuts = tuple[range, ...]
"""The blocks of each stage, in order."""

EVERYWHERE = frozenset({"buckets", "final_norm", "project_out"})
"""Slots outside of blocks that every stage reads: all of them finish what the last one gives."""


def costs(t: Tower) -> list[int]:
    """Of each block, the numbers that one token reads: what a decode step waits for."""
    read = [0] * len(t.blocks)
    for p in params(t):
        if p.block is not None:
            m, n = t.blocks[p.block].mlp, prod(p.shape)
            read[p.block] += n * min(m.top_k, p.stack) // p.stack if p.stack and isinstance(m, Moe) else n
    return read


def head_cost(t: Tower) -> int:
    """The numbers that one token reads behind the last block."""
    tied = t.head is not None and t.head.tied
    read = {"head", "final_norm", *(("tokens",) if tied else ())}
    return sum(prod(p.shape) for p in params(t) if p.slot in read)


def cut(t: Tower, n: int, each: Sequence[float] | None = None, behind: float | None = None) -> Cuts:
    """Runs of blocks for n stages, of which the dearest is as cheap as it can be; of equal ones the evenest.

    each: what a block costs, `behind`: what follows the last; numbers that a token reads where they are not given.
    ConfigError where there are fewer blocks than stages.
    """
    price = list(costs(t) if each is None else each)
    if len(price) < n:
        raise ConfigError(f"pp_size={n}: the model has {len(price)} blocks, and every stage needs one")
    price[-1] += head_cost(t) if behind is None else behind
    before = [0.0, *accumulate(price)]
    total = before[-1] or 1.0
    # best[k]: (dearest stage, sum of squares, ends) of the first k blocks in as many stages as there have been rounds
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for _ in range(n):
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for k in range(1, len(price) + 1):
            ways = [
                (max(dearest, part := (before[k] - before[j]) / total), squares + part * part, (*ends, k))
                for j, (dearest, squares, ends) in best.items()
                if j < k
            ]
            if ways:
                found[k] = min(ways)
        best = found
    return tuple(range(a, b) for a, b in pairwise(best[len(price)][2]))


def counted(t: Tower, layers: Sequence[int]) -> Cuts:
    """The cuts with so many blocks on each stage; ConfigError where they are not all of the tower's."""
    if sum(layers) != len(t.blocks):
        raise ConfigError(
            f"pipeline_parallel.layers={list(layers)} are {sum(layers)} blocks, and the model has {len(t.blocks)}"
        )
    ends = [0, *accumulate(layers)]
    return tuple(range(a, b) for a, b in pairwise(ends))


def part(t: Tower, blocks: range) -> Tower:
    """What the stage of these blocks computes, its embedding and head included."""
    return replace(t, blocks=t.blocks[blocks.start : blocks.stop])


def holders(t: Tower, p: Param, cuts: Cuts) -> tuple[int, ...]:
    """The stages that read a parameter of the whole tower. A tied table is read at both ends."""
    last = len(cuts) - 1
    if p.block is not None:
        return (next(s for s, blocks in enumerate(cuts) if p.block in blocks),)
    if p.slot in EVERYWHERE:
        return tuple(range(len(cuts)))
    if p.slot == "head":
        return (last,)
    return (0, last) if p.slot == "tokens" and t.head is not None and t.head.tied and last else (0,)


def renamed(weights: Mapping[str, Tensor], blocks: range) -> dict[str, Tensor]:
    """The weights under the names that they have in the stage's own tower, those of other stages left out."""
    own = {}
    for name, w in weights.items():
        head, _, rest = name.partition(".")
        if head != "blocks":
            own[name] = w
            continue
        i, _, rest = rest.partition(".")
        if int(i) in blocks:
            own[f"blocks.{int(i) - blocks.start}.{rest}"] = w
    return own
