"""The float32 masters of one tensor-parallel rank's model: the optimizer's files of all its data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from hasten.checkpoints.deepspeed.places import Places
from hasten.checkpoints.deepspeed.states import Partition, States, open_partition
from hasten.checkpoints.deepspeed.zero import in_groups, in_parameters, of_fragments
from hasten.checkpoints.joining import Share
from hasten.errors import WeightError


def read_masters(places: Places, mp: int, states: Mapping[int, States], problems: list[str]) -> dict[str, Share]:
    """Masters of what was trained, and with ZeRO 3 also what was frozen; empty where no optimizer's file is there.

    states: by data-parallel rank, one at least. Files of ranks beyond those that the first one counts are left by
    earlier runs. What is wrong with the files is added to `problems`.
    """
    files = {dp: path for (m, dp), path in places.optimizers.items() if m == mp}
    one = states[min(states)]
    if not files and mp not in places.models:
        problems.append(
            f"{places.folder} has model states of ZeRO 3, whose weights lie in the optimizer's files, and of "
            f"tensor-parallel rank {mp} there is none (zero_pp_rank_*_mp_rank_{mp:02d}_optim_states.pt)"
        )
    if not files or not one.shapes:  # without ZeRO there are no shapes
        return {}
    partitions = _partitions(places.folder, files, problems)
    if problems:
        return {}
    try:
        if partitions[0].stage < 3:
            return in_groups(partitions, one.shapes)
        missing = [r for r in range(len(partitions)) if r not in states]
        problems += [f"{places.folder}: there are no model states of data-parallel rank {r}" for r in missing]
        if missing:
            return {}
        found = in_parameters(partitions, one.shapes)
        return found | of_fragments([states[r].fragments for r in range(len(partitions))], one.frozen, str(one.path))
    except WeightError as e:
        problems.append(str(e))
        return {}


def _partitions(folder: Path, files: Mapping[int, Path], problems: list[str]) -> list[Partition]:
    """The partitions of all ranks that the first one counts, in their order."""
    found: dict[int, Partition] = {}
    count: int | None = None
    for rank, path in files.items():
        if count is not None and rank >= count:
            break
        try:
            found[rank] = open_partition(path)
            count = found[rank].ranks if count is None else count
        except WeightError as e:
            problems.append(str(e))
    missing = [r for r in range(count or 0) if r not in files]
    problems += [f"{folder}: there is no optimizer's file of data-parallel rank {r} of {count}" for r in missing]
    for p in found.values():
        problems += _differences(next(iter(found.values())), p)
    return list(found.values())


def _differences(one: Partition, p: Partition) -> Iterator[str]:
    """In what a partition cannot be of one checkpoint with the first."""
    for what, mine, its in (
        ("ranks", one.ranks, p.ranks),
        ("ZeRO stage", one.stage, p.stage),
        ("ds_version", one.version, p.version),
        ("groups", len(one.flats), len(p.flats)),
    ):
        if mine != its:
            yield f"{p.path} is of {what} {its}, {one.path} of {what} {mine}"
