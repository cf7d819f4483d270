"""A Source of what DeepSpeed's training engine saved, after all that can be wrong with it has been looked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hasten.checkpoints.deepspeed.layers import read_experts, read_layers
from hasten.checkpoints.deepspeed.masters import read_masters
from hasten.checkpoints.deepspeed.megatron import open_megatron
from hasten.checkpoints.deepspeed.patterns import join
from hasten.checkpoints.deepspeed.places import PARTS, Places, list_files, tagged, universal
from hasten.checkpoints.deepspeed.states import States, open_states
from hasten.checkpoints.deepspeed.universal import read_universal
from hasten.checkpoints.files import together
from hasten.checkpoints.joining import Joined, Share, Whole, tensor_share
from hasten.checkpoints.split import Split
from hasten.errors import WeightError


def open_training(folder: Path) -> Joined | Split | None:
    """The source of a folder that DeepSpeed saved to, or of one tag's in it; None where it is neither.

    It is a Split where there are tensor-parallel ranks, and nothing but the model says how they cut their tensors.

    Raises WeightError with everything that is wrong with the files. No tensor is read.
    """
    inside = tagged(folder)
    if inside is None:
        return None
    places = list_files(inside)
    problems = [f"{a} and {b} are of one and the same rank" for a, b in places.twice]
    parts = universal(inside)
    if (megatron := open_megatron(folder, places)) is not None:
        return megatron
    states = _states(places, problems)
    _refuse(folder, problems)
    if parts:
        source = Joined(str(folder), read_universal(parts, states, problems))
    else:
        ranks = read_layers(places, problems) if places.layers else _ranks(places, states, problems)
        source = _source(folder, ranks, states, problems)
    if not source.entries and not problems:
        problems.append(f"{inside} holds no model states, and no {PARTS} folder of parameters")
    _refuse(folder, problems)
    return source


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise WeightError(together(f"{folder} cannot be loaded", list(dict.fromkeys(problems))))


def _states(places: Places, problems: list[str]) -> dict[tuple[int, int], States]:
    """The model states by tensor- and data-parallel rank, of the kind that the checkpoint has."""
    files = {(mp, 0): path for mp, path in places.models.items()} or dict(places.partitioned)
    found: dict[tuple[int, int], States] = {}
    count: int | None = None
    for (mp, dp), path in files.items():
        if count is not None and dp >= count:
            continue  # left by an earlier run of more ranks
        try:
            found[mp, dp] = open_states(path)
            said = found[mp, dp].said["dp_world_size"]
            count = said if count is None and isinstance(said, int) else count
        except WeightError as e:
            problems.append(str(e))
    if found:
        problems += _contradictory(list(found.values()), places)
    return found


def _contradictory(states: list[States], places: Places) -> list[str]:
    """Files of other steps and versions, and tensor-parallel ranks that are missing."""
    one, *others = states
    problems = [
        f"{s.path} is of {what} {s.said[what]}, {one.path} of {what} {one.said[what]}"
        for s in others
        for what in one.said
        if s.said[what] != one.said[what]
    ]
    held = {mp for mp, _ in places.partitioned} | set(places.models)
    ranks = max(held) + 1
    said = one.said.get("mp_world_size")
    if isinstance(said, int) and not places.layers and one.module is not None:
        ranks = max(ranks, said)
    missing = sorted(set(range(ranks)) - held)
    return problems + [f"{places.folder}: there are no model states of tensor-parallel rank {mp}" for mp in missing]


def _ranks(
    places: Places, states: Mapping[tuple[int, int], States], problems: list[str]
) -> dict[int, dict[str, Share]]:
    """What each tensor-parallel rank's model is made of: float32 masters, and what has none from the module."""
    found: dict[int, dict[str, Share]] = {}
    experts = read_experts(places, problems)
    for mp in sorted({mp for mp, _ in states}):
        own = {dp: s for (m, dp), s in states.items() if m == mp}
        masters = {} if places.experts else read_masters(places, mp, own, problems)
        if not problems:
            found[mp] = _with_module(own[min(own)], masters, problems) | experts.get(mp, {})
    return found


def _with_module(states: States, masters: dict[str, Share], problems: list[str]) -> dict[str, Share]:
    """Masters where there are some; buffers, frozen and other parameters from the module; tied ones from one place."""
    if states.module is None:
        problems.append(f"{states.path} is of a pipeline module, and layer_*-model_*-model_states.pt are not beside it")
        return {}
    found = dict(masters)
    tied = {_memory(t): n for n, t in states.module.items() if n in masters and t.numel()}
    for name, t in states.module.items():
        source = states.shared.get(name) or tied.get(_memory(t))
        if name in masters and t.numel() and tuple(t.shape) != masters[name].entry.shape:
            problems.append(f"{name} is {tuple(t.shape)} in {states.path}, its master {masters[name].entry.shape}")
        if source in found:
            found.setdefault(name, found[source])
        elif name not in found and (t.numel() or name in states.buffers or not masters):
            found[name] = tensor_share(t, str(states.path))
    found |= {n: found[source] for n, source in states.shared.items() if source in found and n not in found}
    lost = [n for n in states.module if n not in found]
    problems += [f"{states.path} has no value of {n}, and neither have the partitions" for n in lost]
    return found


def _memory(t: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Where a tensor lies: tied ones are stored once."""
    return t.data_ptr(), tuple(t.shape), t.stride()


def _source(
    folder: Path,
    ranks: Mapping[int, Mapping[str, Share]],
    states: Mapping[tuple[int, int], States],
    problems: list[str],
) -> Joined | Split:
    """Whole tensors of all tensor-parallel ranks' shares."""
    names = {n: None for held in ranks.values() for n in held}
    shares = {n: [held[n] for held in ranks.values() if n in held] for n in names} if not problems else {}
    for name, several in shares.items():
        if len(several) < len(ranks):
            file = several[0].entry.file
            problems.append(f"{name} ({file}) is not on all {len(ranks)} tensor-parallel ranks")
    patterns = next((s.patterns for s in states.values()), None)
    if problems or (patterns is None and len(ranks) > 1):
        return Split(str(folder), shares)
    wholes: dict[str, Whole] = {}
    for name, several in shares.items():
        try:
            wholes[name] = join(name, several, patterns or {})
        except ValueError as e:
            problems.append(f"{name} ({several[0].entry.file}): {e}")
    return Joined(str(folder), wholes)
