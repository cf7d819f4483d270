"""Which processes hold the model together: found among the user's groups or the launcher's, or brought together."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist

from hasten.errors import ConfigError
from hasten.inject.kinds import pipeline_size, world_size
from hasten.parallel import ALONE, Alone, Place, Processes
from hasten.parallel.symmetric import closest

GROUPS = ("get_tensor_model_parallel_group", "get_model_parallel_group")
STAGES = ("get_pipeline_model_parallel_group",)
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCH = "start the script with `hasten run --num_gpus {} script.py`, torchrun or DeepSpeed's launcher"
_joined: WeakSet[Processes] = WeakSet()
_grids: dict[tuple[int, int], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}  # of the world, made once


@dataclass(frozen=True, slots=True)
class Asked:
    """How many processes the user wants, and which: numbers, groups, or a model-parallel unit that has both."""

    tp_size: int = 1
    tp_group: Any = None
    pp_size: int = 1
    pp_group: Any = None
    mpu: Any = None

    @property
    def tensor(self) -> int:
        """How many processes divide every layer, as far as the options say."""
        given = [world_size(g) for g in (self.tp_group, self.mpu) if g is not None]
        return max(self.tp_size, *given, 1)

    @property
    def stages(self) -> int:
        given = 1 if self.pp_group is None else world_size(self.pp_group)
        return max(self.pp_size, given, 1 if self.mpu is None else pipeline_size(self.mpu))

    @property
    def ranks(self) -> int:
        """How many processes hold the model together."""
        return self.tensor * self.stages


def join(asked: Asked, on: torch.device) -> Place:
    """Where this process stands among those that the user names.

    on: the kind of device that the model computes on. torch.distributed is initialised if nobody has done so. Raises
    ConfigError where the processes are not there, or cannot exchange what lies on such a device.
    """
    if asked.ranks == 1:
        return ALONE
    tensor, chain = _given(asked.mpu, asked.tp_group, GROUPS), _given(asked.mpu, asked.pp_group, STAGES)
    if (tensor is None and asked.tensor > 1) or (chain is None and asked.stages > 1):
        _check_grid(asked, tensor, chain)
        tensor, chain = _grid(asked, on.type)
    for group in (tensor, chain):
        if group is not None:
            _check_member(group, on.type)
    over = Alone() if tensor is None else closest(tensor, on)
    stages = None if chain is None else Processes(chain)
    _joined.update(p for p in (over, stages) if isinstance(p, Processes))
    return Place(over, stages)


def local_device() -> torch.device:
    """The GPU of this process: the one that LOCAL_RANK counts, where a launcher says, else the current one."""
    count, own = torch.cuda.device_count(), os.environ.get("LOCAL_RANK", "")
    if own.isdigit() and "WORLD_SIZE" in os.environ:
        if int(own) >= count > 1:
            raise ConfigError(f"LOCAL_RANK={own}, but this machine has {count} visible GPUs, one for each rank")
        torch.cuda.set_device(int(own) % count)  # one alone: a launcher that shows each rank its own
    return torch.device("cuda", torch.cuda.current_device())


def _given(mpu: Any, group: Any, names: tuple[str, ...]) -> dist.ProcessGroup | None:
    """The group that the user names, itself or by his unit; None where it has one process, or there is none."""
    if group is not None:
        return group if world_size(group) > 1 else None
    stages = names == STAGES
    if mpu is None or (pipeline_size(mpu) if stages else world_size(mpu)) == 1:
        return None
    find = next((getattr(mpu, n) for n in names if callable(getattr(mpu, n, None))), None)
    if find is None:
        raise ConfigError(f"mpu: {type(mpu).__name__} has none of {', '.join(f'{n}()' for n in names)}")
    return find()


def _check_grid(asked: Asked, tensor: dist.ProcessGroup | None, chain: dist.ProcessGroup | None) -> None:
    """ConfigError where one of two groups that are needed is named: the other cannot be guessed from it."""
    if (tensor is not None or chain is not None) and asked.tensor > 1 and asked.stages > 1:
        given, lacks = ("pipeline_parallel.pp_group", "tensor_parallel.tp_group")[:: 1 if tensor is None else -1]
        raise ConfigError(f"{given} is named and {lacks} is not: name both, or neither")


def _grid(asked: Asked, device: str) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The groups of this process among all of the launcher's: the ranks of a stage lie side by side."""
    world = _world(asked, device)
    across, along = asked.tensor, asked.stages
    if 1 in (across, along):
        return (world, None) if along == 1 else (None, world)
    if (across, along) not in _grids:
        own, me = list[dist.ProcessGroup](), dist.get_rank()
        rows = [list(range(s * across, (s + 1) * across)) for s in range(along)]
        for members in (*rows, *map(list, zip(*rows, strict=True))):  # every process makes every group
            made = dist.new_group(members)
            if me in members:
                assert isinstance(made, dist.ProcessGroup), "this process is a member"
                own.append(made)
        _grids[across, along] = own[0], own[1]
    return _grids[across, along]


def _world(asked: Asked, device: str) -> dist.ProcessGroup:
    """All processes of the launcher, which have to be as many as asked for."""
    if not dist.is_initialized():
        lacks = [n for n in ENVIRONMENT if n not in os.environ]
        if lacks:
            raise ConfigError(
                f"{_sizes(asked)} divides the model among {asked.ranks} processes, and this one is alone "
                f"({', '.join(lacks)} not set): {LAUNCH.format(asked.ranks)}"
            )
        if os.environ["WORLD_SIZE"] != str(asked.ranks):
            raise ConfigError(_mismatch(asked, os.environ["WORLD_SIZE"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(_leave)
    world = dist.group.WORLD
    assert world is not None
    if dist.get_world_size() != asked.ranks:
        raise ConfigError(_mismatch(asked, str(dist.get_world_size())))
    return world


def _leave() -> None:
    """Let go of every group as the process ends: the threads of one that is still held would abort it."""
    for p in _joined:
        p.__dict__.pop("group", None)
    _grids.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _sizes(asked: Asked) -> str:
    return f"mp_size={asked.tensor}" + (f" and pp_size={asked.stages}" if asked.stages > 1 else "")


def _mismatch(asked: Asked, world: str) -> str:
    if asked.stages > 1:
        return (
            f"{_sizes(asked)} make {asked.ranks}, but {world} processes were started: "
            f"{LAUNCH.format(asked.ranks)}, or name the processes that share the model with "
            "tensor_parallel={'tp_group': group} and pipeline_parallel={'pp_group': group}"
        )
    return (
        f"mp_size={asked.tensor}, but {world} processes were started: {LAUNCH.format(asked.tensor)}, say "
        f"mp_size={world}, or name the processes that share the model with tensor_parallel={{'tp_group': group}}"
    )


def _check_member(group: dist.ProcessGroup, device: str) -> None:
    if dist.get_rank(group) < 0:
        raise ConfigError(f"rank {dist.get_rank()} is no member of a group that the options name")
    serving = dict(pair.split(":", 1) for pair in dist.get_backend_config(group).split(","))
    if device not in serving:
        served = ", ".join(f"{b} for {d}" for d, b in serving.items())
        raise ConfigError(
            f"the model computes on {device}, and its group of processes exchanges nothing there (it has {served}): "
            f"initialise torch.distributed with {'nccl' if device == 'cuda' else 'gloo'}, or leave that to Hasten"
        )
