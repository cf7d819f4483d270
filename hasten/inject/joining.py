"""Which processes hold the model together, found or brought together, and whether all of them hold the same one."""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hasten.errors import ConfigError, HastenError, WeightError
from hasten.inject.kinds import world_size
from hasten.parallel import Group, Place, Processes
from hasten.parallel.symmetric import closest
from hasten.spec import Tower
from hasten.weights import Split, check

GROUPS = ("get_model_parallel_group", "get_tensor_model_parallel_group")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCH = "start the script with `hasten run --num_gpus {} script.py`, torchrun or DeepSpeed's launcher"
_joined: WeakSet[Processes] = WeakSet()
SAID = 1000  # bytes of an error that the other ranks hear
COMPARED = ("the parameters' names, shapes and dtypes", "the parameters' values", "the description of the layers")


@dataclass(frozen=True, slots=True)
class Division:
    """Among whom a model is divided, how its experts are, and where this rank keeps its share (None: as the model).

    home: where whole tensors go when they are wanted again (None: where the model had them). vocabulary: the slots
    of the vocabulary's parameters that are divided too.
    """

    group: Group
    experts: Split = "inside"
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    home: torch.device | None = None
    vocabulary: frozenset[str] = frozenset()

    @property
    def place(self) -> Place:
        return Place(self.group)


def ranks(size: int, mpu: Any, group: Any) -> int:
    """How many processes hold the model together, as far as the options say."""
    return max(size, 1 if mpu is None else world_size(mpu), 1 if group is None else world_size(group))


def join(size: int, mpu: Any, group: Any, on: torch.device) -> Group | None:
    """The processes that `size`, a model-parallel unit or a group names, None where this one is alone.

    on: the kind of device that the model computes on. torch.distributed is initialised if nobody has done so. Raises
    ConfigError where the processes are not there, or cannot exchange what lies on such a device.
    """
    if ranks(size, mpu, group) == 1:
        return None
    found = _given(mpu, group) or _world(size, on.type)
    if dist.get_rank(found) < 0:
        raise ConfigError(f"rank {dist.get_rank()} is no member of the group that tensor_parallel names")
    _check_backend(found, on.type)
    joined = closest(found, on)
    _joined.add(joined)
    return joined


def local_device() -> torch.device:
    """The GPU of this process: the one that LOCAL_RANK counts, where a launcher says, else the current one."""
    count, own = torch.cuda.device_count(), os.environ.get("LOCAL_RANK", "")
    if own.isdigit() and "WORLD_SIZE" in os.environ:
        if int(own) >= count > 1:
            raise ConfigError(f"LOCAL_RANK={own}, but this machine has {count} visible GPUs, one for each rank")
        torch.cuda.set_device(int(own) % count)  # one alone: a launcher that shows each rank its own
    return torch.device("cuda", torch.cuda.current_device())


def _given(mpu: Any, group: Any) -> dist.ProcessGroup | None:
    if group is not None and world_size(group) > 1:
        return group
    if mpu is None or world_size(mpu) == 1:
        return None
    find = next((getattr(mpu, n) for n in GROUPS if callable(getattr(mpu, n, None))), None)
    if find is None:
        raise ConfigError(f"mpu: {type(mpu).__name__} has none of {', '.join(f'{n}()' for n in GROUPS)}")
    return find()


def _world(size: int, device: str) -> dist.ProcessGroup:
    """All processes of the launcher, which have to be `size`."""
    if not dist.is_initialized():
        lacks = [n for n in ENVIRONMENT if n not in os.environ]
        if lacks:
            raise ConfigError(
                f"mp_size={size} divides the model among {size} processes, and this one is alone ({', '.join(lacks)} "
                f"not set): {LAUNCH.format(size)}"
            )
        if os.environ["WORLD_SIZE"] != str(size):
            raise ConfigError(_mismatch(size, os.environ["WORLD_SIZE"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(_leave)
    world = dist.group.WORLD
    assert world is not None
    if dist.get_world_size() != size:
        raise ConfigError(_mismatch(size, str(dist.get_world_size())))
    return world


def _leave() -> None:
    """Let go of every group as the process ends: the threads of one that is still held would abort it."""
    for p in _joined:
        p.__dict__.pop("group", None)
    if dist.is_initialized():
        dist.destroy_process_group()


def _mismatch(size: int, world: str) -> str:
    return (
        f"mp_size={size}, but {world} processes were started: {LAUNCH.format(size)}, say mp_size={world}, or name the "
        "processes that share the model with tensor_parallel={'tp_group': group}"
    )


def _check_backend(group: dist.ProcessGroup, device: str) -> None:
    serving = dict(pair.split(":", 1) for pair in dist.get_backend_config(group).split(","))
    if device not in serving:
        served = ", ".join(f"{b} for {d}" for d, b in serving.items())
        raise ConfigError(
            f"the model computes on {device}, and its group of processes exchanges nothing there (it has {served}): "
            f"initialise torch.distributed with {'nccl' if device == 'cuda' else 'gloo'}, or leave that to Hasten"
        )


def check_divisible(towers: Iterable[Tower], size: int, experts: Split) -> None:
    """ConfigError unless every tower can be divided among so many ranks."""
    for t in towers:
        check(t, size, experts)


@contextmanager
def in_step(group: Group | None, device: torch.device, what: str) -> Iterator[None]:
    """What fails inside on one rank fails on all: there with its own error, elsewhere with one that tells of it.

    device: where the group exchanges. Inside, ranks do not wait for each other. Raises HastenError.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    if group is not None:
        said = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()[:SAID]
        own = torch.tensor(list(said.ljust(SAID, b"\0")), dtype=torch.uint8, device=device)
        heard = [bytes(told).rstrip(b"\0") for told in group.all_gather(own).view(group.size, SAID).tolist()]
        if failure is None and any(heard):
            parts = [f"rank {r}: {told.decode(errors='replace')}" for r, told in enumerate(heard) if told]
            failure = HastenError(
                f"{what} failed elsewhere, so rank {group.rank} of {group.size} gave it up too. " + "; ".join(parts)
            )
    if failure is not None:
        raise failure


def compare(
    group: Group, device: torch.device, model: nn.Module, towers: Iterable[Tower], apart: Collection[str] = ()
) -> None:
    """WeightError, on every rank, where ranks do not hold the same model; `apart` are names whose values are not."""
    heard = group.all_gather(torch.tensor(_digests(model, towers, apart), device=device)).view(group.size, -1).tolist()
    unlike = [r for r, told in enumerate(heard) if told != heard[0]]
    if unlike:
        parts = [what for k, what in enumerate(COMPARED) if any(told[k] != heard[0][k] for told in heard)]
        raise WeightError(
            f"{_named(unlike)} of {group.size} loaded another model than rank 0: {' and '.join(parts)} differ; every "
            "rank has to give init_inference the same"
        )


def _named(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _digests(model: nn.Module, towers: Iterable[Tower], apart: Collection[str]) -> list[int]:
    """Numbers that differ, but for chance, where models do, in the order of COMPARED: of each tensor three values."""
    tensors: Mapping[str, Tensor] = dict(model.named_parameters())
    shapes = [(n, tuple(t.shape), str(t.dtype)) for n, t in tensors.items()]
    with torch.no_grad():
        whole = [t for n, t in tensors.items() if t.numel() and n not in apart]
        few = torch.stack([t[at].double() for t in whole for at in _places(t.shape)]).tolist() if whole else []
    return [_number(repr(x)) for x in (shapes, few, [*towers])]


def _places(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The first, a middle and the last place."""
    return [tuple(0 for _ in shape), tuple(n // 2 for n in shape), tuple(n - 1 for n in shape)]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def share_draws(group: Group) -> None:
    """Every rank draws what rank 0 draws from here on, by torch's own generators of the host and its GPU."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    host, device = group.share((torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None))
    torch.set_rng_state(host)
    if device is not None and cuda:
        torch.cuda.set_rng_state(device)
