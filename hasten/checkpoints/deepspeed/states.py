"""Single files of DeepSpeed, mapped: a rank's model states, and its partition of the optimizer's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.checkpoints.files import few, first_line
from hasten.checkpoints.pickles import Record, load
from hasten.errors import WeightError

Shapes = tuple[Mapping[str, tuple[int, ...]], ...]
"""Names and shapes of trained parameters, group by group of the optimizer, in the order of their memory."""


@dataclass(frozen=True, slots=True)
class States:
    """What one rank's model states say.

    module: its tensors by name; with ZeRO 3 the parameters are empty. None: a pipeline module, whose layers have files.
    shapes: of what was trained with ZeRO; frozen and fragments: of what was not, with ZeRO 3 this rank's part of it.
    patterns: what is said of joining tensor-parallel ranks (universal_checkpoint_info); None: nothing.
    """

    path: Path
    module: Mapping[str, Tensor] | None
    shapes: Shapes
    frozen: Mapping[str, tuple[int, ...]]
    fragments: Mapping[str, Tensor]
    buffers: frozenset[str]
    shared: Mapping[str, str]
    patterns: Mapping[str, Any] | None
    said: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Partition:
    """One data-parallel rank's part of the float32 masters.

    stage: 1, 2 or 3. flats: its tensors of one dimension, group by group. paddings: the elements behind each parameter.
    """

    path: Path
    stage: int
    flats: tuple[Tensor, ...]
    ranks: int
    paddings: tuple[tuple[int, ...], ...]
    version: object


SAID = ("global_steps", "ds_version", "dp_world_size", "mp_world_size")


def open_states(path: Path) -> States:
    """Raises WeightError for a file that is missing, damaged or hostile, or no file of model states."""
    content = _dict(path)
    if "module" not in content:
        raise WeightError(f"{path} holds no model states: it has {few(sorted(map(str, content))) or 'nothing'}")
    try:
        return _states(path, content)
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        if isinstance(e, WeightError):
            raise
        raise WeightError(f"{path} holds no model states as DeepSpeed writes them: {first_line(e)}") from e


def _states(path: Path, content: Mapping[str, Any]) -> States:
    module = content["module"]
    return States(
        path,
        None if module is None else tensors(path, module),
        tuple(_shapes(g) for g in content.get("param_shapes") or ()),
        _shapes(content.get("frozen_param_shapes") or {}),
        tensors(path, content.get("frozen_param_fragments") or {}),
        frozenset(content.get("buffer_names") or ()),
        dict(content.get("shared_params") or {}),
        content.get("universal_checkpoint_info"),
        {n: content.get(n) for n in SAID},
    )


def open_partition(path: Path) -> Partition:
    """Raises WeightError for a file that is missing, damaged or hostile, or no partition of ZeRO's."""
    said = _dict(path).get("optimizer_state_dict")
    states: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
    key = next((k for k in ("fp32_flat_groups", "single_partition_of_fp32_groups") if k in states), None)
    if key is None:
        raise WeightError(
            f"{path} holds no partition of ZeRO's: expected single_partition_of_fp32_groups or fp32_flat_groups"
        )
    flats = states[key]
    if not isinstance(flats, (list, tuple)) or not all(isinstance(t, Tensor) and t.dim() == 1 for t in flats):
        raise WeightError(f"{path}: {key} is no list of flat tensors")
    count = states.get("partition_count")
    counts: list[Any] = list(count) if isinstance(count, (list, tuple)) else [count]
    if not counts or not all(isinstance(n, int) and n > 0 for n in counts):
        raise WeightError(f"{path}: partition_count is {count!r:.40}, expected a number of ranks")
    return Partition(
        path,
        3 if key == "fp32_flat_groups" else _stage(states.get("zero_stage")),
        tuple(t.detach() for t in flats),
        max(counts),
        tuple(tuple(max(int(n), 0) for n in group) for group in states.get("param_alignment_paddings") or ()),
        states.get("ds_version"),
    )


def tensors(path: Path, named: object) -> dict[str, Tensor]:
    """The tensors of a state dict; raises WeightError where it holds anything else."""
    if not isinstance(named, Mapping):
        raise WeightError(f"{path} holds no state dict but a {type(named).__name__}")
    held = {n: t for n, t in named.items() if t is not None and not str(n).endswith("_extra_state")}
    odd = [f"{n} ({type(t).__name__})" for n, t in held.items() if not _plain(n, t)]
    if odd:
        raise WeightError(f"{path} holds more than tensors in its model: {few(odd)}")
    return {n: t.detach() for n, t in held.items()}


def _plain(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _dict(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise WeightError(f"{path}: there is no such file")
    content = load(path)
    if not isinstance(content, Mapping):
        raise WeightError(f"{path} holds no dict but a {type(content).__name__}")
    return content


def _shapes(named: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, ...]]:
    shapes = {n: tuple(torch.Size(s)) for n, s in named.items()}
    if odd := [f"{n} {s}" for n, s in shapes.items() if min(s, default=0) < 0]:
        raise ValueError(f"shapes below zero: {few(odd)}")
    return shapes


def _stage(said: object) -> int:
    """ZeRO's stage: an enum whose class is not loaded, a number, or missing with the optimizer for bfloat16."""
    value = said.parts[0] if isinstance(said, Record) and said.parts else said
    return value if isinstance(value, int) and value > 0 else 1
