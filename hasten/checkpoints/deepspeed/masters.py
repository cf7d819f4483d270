"""The float32 masters of one tensor-parallel rank's model: the optimizer's files of all its data-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hasten.checkpoints.deepspeed.places import Places
from hasten.checkpoints.deepspeed.states import Partition, States, open_partition
from hasten.checkpoints.deepspeed.zero import in_groups, in_parameters, of_fragments
from hasten.checkpoints.files import together
from hasten.checkpoints.joining import Share
from hasten.errors import WeightError


def read_masters(places: Places, mp: int, states: Mapping[int, States]) -> dict[str, Share]:
    """Masters of what was trained, and with ZeRO 3 also what was frozen; empty where no optimizer's file is there.

    states: by data-parallel rank. Files of ranks beyond those that the first one counts are left by earlier runs.
    Raises WeightError with everything that is wrong with the files.
    """
    files = {dp: path for (m, dp), path in places.optimizers.items() if m == mp}
    if not states:
        raise WeightError(f"{places.folder}: there are no model states of tensor-parallel rank {mp}")
    one = states[min(states)]
    if not files:
        if mp not in places.models:
            raise WeightError(
                f"{places.folder} has model states of ZeRO 3, whose weights lie in the optimizer's files, and of "
                f"tensor-parallel rank {mp} there is none (zero_pp_rank_*_mp_rank_{mp:02d}_optim_states.pt)"
            )
        return {}
    if not one.shapes:
        return {}  # an optimizer of the user's own
    partitions = _partitions(places.folder, files)
    if partitions[0].stage < 3:
        return in_groups(partitions, one.shapes)
    missing = [r for r in range(len(partitions)) if r not in states]
    if missing:
        raise WeightError(
            together("", [f"{places.folder}: there are no model states of data-parallel rank {r}" for r in missing])
        )
    found = in_parameters(partitions, one.shapes)
    return found | of_fragments([states[r].fragments for r in range(len(partitions))], one.frozen, str(one.path))


def _partitions(folder: Path, files: Mapping[int, Path]) -> list[Partition]:
    problems: list[str] = []
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
    if found:
        one, *others = found.values()
        for p in others:
            for what, mine, its in (
                ("ranks", one.ranks, p.ranks),
                ("ZeRO stage", one.stage, p.stage),
                ("ds_version", one.version, p.version),
                ("groups", len(one.flats), len(p.flats)),
            ):
                if mine != its:
                    problems.append(f"{p.path} is of {what} {its}, {one.path} of {what} {mine}")
    if problems:
        raise WeightError("\n  ".join(problems))
    return list(found.values())
