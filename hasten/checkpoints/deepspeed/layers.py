"""Files of parts of a model: layers of a pipeline module, and experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.checkpoints.deepspeed.places import Places
from hasten.checkpoints.deepspeed.states import tensors
from hasten.checkpoints.joining import Share, tensor_share
from hasten.checkpoints.pickles import load
from hasten.errors import WeightError


def read_layers(places: Places, problems: list[str]) -> dict[int, dict[str, Share]]:
    """By tensor-parallel rank: each layer's tensors, below its number in the pipeline module's list of layers."""
    problems += check_layers(places)
    found: dict[int, dict[str, Share]] = {mp: {} for _, mp in places.layers}
    for (layer, mp), path in places.layers.items():
        found[mp] |= _file(path, f"{layer}.", problems)
    return found


def check_layers(places: Places) -> list[str]:
    """Files that are missing of layers or tensor-parallel ranks which others tell of."""
    ranks = {mp for _, mp in places.layers}
    every = range(max(ranks) + 1)
    return [f"{places.folder}: there are no layers of tensor-parallel rank {mp}" for mp in every if mp not in ranks] + [
        f"{places.folder}: there is no file of layer {layer}, tensor-parallel rank {mp}"
        for layer in sorted({layer for layer, _ in places.layers})
        for mp in sorted(ranks)
        if (layer, mp) not in places.layers
    ]


def read_experts(places: Places, problems: list[str]) -> dict[int, dict[str, Share]]:
    """By tensor-parallel rank: the tensors of all experts, whose files hold their whole names."""
    found: dict[int, dict[str, Share]] = {}
    numbers: dict[tuple[int, int], set[int]] = {}
    for (mp, layer, expert), path in places.experts.items():
        numbers.setdefault((mp, layer), set()).add(expert)
        found.setdefault(mp, {}).update(_file(path, "", problems))
    most = max((max(n) + 1 for n in numbers.values()), default=0)
    for (mp, layer), held in numbers.items():
        for expert in sorted(set(range(most)) - held):
            problems.append(
                f"{places.folder}: there is no file of expert {expert}, layer {layer}, tensor-parallel rank {mp}"
            )
    return found


def _file(path: Path, prefix: str, problems: list[str]) -> Mapping[str, Share]:
    try:
        content: Any = load(path)
        return {prefix + n: tensor_share(t, str(path)) for n, t in tensors(path, content).items()}
    except WeightError as e:
        problems.append(str(e))
        return {}
