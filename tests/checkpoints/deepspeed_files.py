"""Writes what DeepSpeed's training engine writes, without DeepSpeed: files by the layout of their bytes."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ZERO = "deepspeed.runtime.zero.config"


class ZeroStageEnum(int, enum.Enum):
    gradients = 2
    weights = 3
    optimizer_states = 1


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0


@contextmanager
def as_deepspeeds(*classes: type) -> Iterator[None]:
    """Inside, these classes are pickled as if they were in a module of DeepSpeed's."""
    module, own = ModuleType(ZERO), [c.__module__ for c in classes]
    names = ["deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", ZERO]
    before = {n: sys.modules.get(n) for n in names}
    try:
        sys.modules |= {n: ModuleType(n) for n in names[:-1]} | {ZERO: module}
        for c in classes:
            c.__module__ = ZERO
            setattr(module, c.__name__, c)
        yield
    finally:
        for c, name in zip(classes, own, strict=True):
            c.__module__ = name
        for n, m in before.items():
            sys.modules.pop(n)
            if m is not None:
                sys.modules[n] = m


def write(
    folder: Path,
    trained: Sequence[Mapping[str, Tensor]],
    stage: int,
    ranks: int = 1,
    *,
    module: Mapping[str, Tensor] | None = None,
    frozen: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, str] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tag: str = "global_step7",
    mp: int = 0,
    mp_ranks: int = 1,
    unit: int = 1,
    sub_group: int = 10**9,
    prefix: str = "bf16_",
    **more: Any,
) -> Path:
    """The tag's folder. `trained` are groups of float32 masters; `unit` is what parameters are aligned to."""
    inside = folder / tag
    inside.mkdir(parents=True, exist_ok=True)
    (folder / "latest").write_text(tag)
    frozen, shared, buffers = frozen or {}, shared or {}, buffers or {}
    live = {n: t.to(dtype) for g in trained for n, t in g.items()} | dict(frozen)
    live |= {alias: live[source] for alias, source in shared.items()} | dict(buffers)
    states = {
        "module": dict(module if module is not None else live),
        "buffer_names": list(buffers),
        "optimizer": None,
        "param_shapes": [{n: t.shape for n, t in g.items()} for g in trained] if stage else None,
        "frozen_param_shapes": {n: t.shape for n, t in frozen.items()} if stage > 1 else None,
        "shared_params": dict(shared),
        "frozen_param_fragments": dict(frozen) if stage == 2 else None,
        "global_steps": 7,
        "dp_world_size": ranks,
        "mp_world_size": mp_ranks,
        "ds_version": "0.19.8",
        **more,
    }
    if stage < 3:
        torch.save(states, inside / f"mp_rank_{mp:02d}_model_states.pt")
    for r in range(ranks if stage else 0):
        if stage == 3:
            empty = {n: t if n in buffers else torch.empty(0, dtype=t.dtype) for n, t in live.items()}
            parts = {n: piece(t, ranks, r) for n, t in frozen.items()}
            own = {**states, "module": empty, "frozen_param_fragments": parts, "shared_params": {} if r else shared}
            torch.save(own, inside / f"zero_pp_rank_{r}_mp_rank_{mp:02d}_model_states.pt")
            kept = {"fp32_flat_groups": sub_groups(trained, ranks, r, sub_group), "partition_count": ranks}
        else:
            kept = in_groups(trained, ranks, r, unit)
        kept |= {"zero_stage": ZeroStageEnum(stage), "loss_scaler": LossScaler(), "ds_version": "0.19.8"}
        with as_deepspeeds(ZeroStageEnum, LossScaler):
            path = inside / f"{prefix}zero_pp_rank_{r}_mp_rank_{mp:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": kept, "ds_version": "0.19.8"}, path)
    return inside


def in_groups(trained: Sequence[Mapping[str, Tensor]], ranks: int, rank: int, unit: int) -> dict[str, Any]:
    """One rank's part of ZeRO 1 and 2: of each group laid out flat, behind the end of which nothing is kept."""
    flats, paddings = [], []
    for group in trained:
        gaps = [(-t.numel()) % unit for t in group.values()]
        gaps[-1] = 0
        flat = torch.cat(
            [
                torch.cat([t.flatten(), t.new_full((gap,), torch.nan)])
                for t, gap in zip(group.values(), gaps, strict=True)
            ]
        )
        each = -(-len(flat) // (2 * ranks)) * 2
        flats.append(flat[rank * each : (rank + 1) * each].clone())
        paddings.append(gaps)
    more = {"param_alignment_paddings": paddings} if unit > 1 else {}
    return {"single_partition_of_fp32_groups": flats, "partition_count": [ranks] * len(trained), **more}


def piece(t: Tensor, ranks: int, rank: int) -> Tensor:
    """One rank's part of a parameter of ZeRO 3, padded at its end."""
    each = -(-t.numel() // ranks)
    flat = torch.cat([t.flatten(), t.new_full((each * ranks - t.numel(),), torch.nan)])
    return flat[rank * each : (rank + 1) * each].clone()


def sub_groups(trained: Sequence[Mapping[str, Tensor]], ranks: int, rank: int, size: int) -> list[Tensor]:
    """One rank's flat tensors of ZeRO 3, cut after `size` elements wherever that is."""
    flat = torch.cat([piece(t, ranks, rank) for g in trained for t in g.values()])
    return [t.clone() for t in flat.split(size)]
