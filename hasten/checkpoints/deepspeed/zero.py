"""Whole tensors of the partitions that data-parallel ranks keep of one tensor-parallel rank's model.

ZeRO 1 and 2: the parameters of a group lie one behind the other in all ranks' partitions of it, one behind the other.

    rank 0      | a a a a a b b b |
    rank 1      | b b c c c c . . |        the end may be padded, or the padding taken off

ZeRO 3: every rank has ceil(n / ranks) elements of each parameter, of all groups one behind the other.

    rank 0      | a a a | b b b | c c |
    rank 1      | a a . | b b . | c c |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from hasten.checkpoints.deepspeed.flat import cut, share
from hasten.checkpoints.deepspeed.states import Partition, Shapes
from hasten.checkpoints.joining import Share
from hasten.errors import WeightError

ALIGNED = 2
"""Groups of ZeRO 1 and 2 are padded to a multiple of this for each rank."""


def in_groups(partitions: Sequence[Partition], shapes: Shapes) -> dict[str, Share]:
    """The float32 masters of ZeRO 1 and 2. Raises WeightError where partitions do not hold what `shapes` say."""
    found: dict[str, Share] = {}
    first, unit = partitions[0], ALIGNED * len(partitions)
    if len(first.flats) != len(shapes):
        raise WeightError(f"{first.path} has {len(first.flats)} groups of parameters, the model states {len(shapes)}")
    for g, named in enumerate(shapes):
        flats = [p.flats[g] for p in partitions]
        paddings = first.paddings[g] if g < len(first.paddings) else (0,) * len(named)
        if len(paddings) != len(named):
            raise WeightError(f"{first.path} pads {len(paddings)} parameters of group {g}, which has {len(named)}")
        start = 0
        for (name, shape), padding in zip(named.items(), paddings, strict=True):
            stop = start + math.prod(shape)
            found[name] = share(cut(flats, start, stop), shape, str(_holder(partitions, flats, start)))
            start = stop + padding
        _check(start, sum(t.numel() for t in flats), unit, g, partitions)
    return found


def _check(needed: int, held: int, unit: int, group: int, partitions: Sequence[Partition]) -> None:
    if held < needed or -(-needed // unit) != -(-held // unit):
        raise WeightError(
            f"group {group} has {held} elements in the files of {len(partitions)} "
            f"ranks ({partitions[0].path}), but its parameters need {needed}: they are not of one checkpoint"
        )


def _holder(partitions: Sequence[Partition], flats: Sequence[Tensor], start: int) -> str:
    """The file in which an element of a group lies."""
    end = 0
    for p, t in zip(partitions, flats, strict=True):
        end += t.numel()
        if start < end:
            return str(p.path)
    return str(partitions[-1].path)


def in_parameters(partitions: Sequence[Partition], shapes: Shapes) -> dict[str, Share]:
    """The float32 masters of ZeRO 3. Raises WeightError where partitions do not hold what `shapes` say."""
    found: dict[str, Share] = {}
    start, ranks = 0, len(partitions)
    for name, shape in (item for group in shapes for item in group.items()):
        n = math.prod(shape)
        each = -(-n // ranks)
        runs = [
            run
            for r, p in enumerate(partitions)
            for run in cut(p.flats, start, start + max(0, min(each, n - r * each)))
        ]
        found[name] = share(runs, shape, str(partitions[0].path))
        start += each
    held = [sum(t.numel() for t in p.flats) for p in partitions]
    if wrong := [f"{p.path} has {n}" for p, n in zip(partitions, held, strict=True) if n != start]:
        raise WeightError(f"the parameters need {start} elements of every rank, but {', '.join(wrong)}")
    return found


def of_fragments(
    fragments: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], file: str
) -> dict[str, Share]:
    """Frozen parameters of ZeRO 3, of which each rank has a part in its model states. Raises WeightError as above."""
    found: dict[str, Share] = {}
    for name, shape in shapes.items():
        parts = [f[name].flatten() for f in fragments if name in f]
        n = math.prod(shape)
        if len(parts) < len(fragments) or sum(t.numel() for t in parts) < n:
            raise WeightError(f"{name} ({file}) was frozen, and the ranks' fragments do not make {shape} of it")
        found[name] = share(cut(parts, 0, n), shape, file)
    return found
