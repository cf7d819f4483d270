"""The kinds of value that a key of `init_inference` can take.

A kind reads what the user wrote into its one normal form, so that two spellings of the same thing compare equal
("fp32" and torch.float32), and says what it expects when it cannot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from hasten.inject.dtypes import read_dtype
from hasten.inject.policy import read_policies


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of value: `name` for tables, `read` for normalization; `read` raises ValueError("what is expected")."""

    name: str
    read: Callable[[Any], Any]


def shown(value: object) -> str:
    """`value` as messages show it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _instance(value: Any, types: type | tuple[type, ...], expected: str) -> Any:
    if isinstance(value, types):
        return value
    raise ValueError(expected)


def _integer(value: Any) -> int:
    # bool is a subclass of int, and True is no count of anything
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    raise ValueError("an integer")


def _count(value: Any) -> int:
    try:
        number = _integer(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError("an integer of at least 1")
    return number


def _counts(value: Any) -> tuple[int, ...]:
    try:
        numbers = tuple(_count(item) for item in (value if isinstance(value, (list, tuple)) else [value]))
    except ValueError:
        numbers = ()
    if not numbers:
        raise ValueError("an integer of at least 1 or a list of such")
    return numbers


def _text(value: Any) -> str:
    return _instance(value, str, "a string")


def _name(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError("a non-empty string")


def _path(value: Any) -> str:
    return os.fsdecode(_instance(value, (str, os.PathLike), "a path"))


def _mapping(value: Any) -> dict[str, Any]:
    return dict(_instance(value, Mapping, "an object (dict)"))


def _certify(value: Any) -> bool | dict[str, Any]:
    return value if isinstance(value, bool) else _mapping(_instance(value, Mapping, "True, False or an object (dict)"))


def _device(value: Any) -> torch.device:
    """A device that this machine has and that can hold data."""
    expected = "a torch.device or its name, such as 'cpu' or 'cuda:0'"
    if not isinstance(value, (str, torch.device)):
        raise ValueError(expected)
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{expected}, of this machine (torch says: {reason})") from error
    if device.type == "meta":
        raise ValueError(f"{expected}; the meta device holds no data")
    return device


SIZES = ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size", "size")
PIPELINE = ("get_pipeline_model_parallel_world_size",)


def world_size(value: Any, methods: tuple[str, ...] = SIZES, expected: str = "processes") -> int:
    """The number of ranks of a Megatron model-parallel unit or a process group; ValueError says what is `expected`."""
    for method in methods:
        size = getattr(value, method, None)
        if callable(size):
            try:
                return _integer(size())
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ValueError(f"{expected}, initialized ({method}() failed: {error})") from error
    raise ValueError(expected)


def pipeline_size(mpu: Any) -> int:
    """The number of stages that a model-parallel unit has; 1 where it knows of none."""
    return world_size(mpu, PIPELINE) if callable(getattr(mpu, PIPELINE[0], None)) else 1


def _mpu(value: Any) -> Any:
    world_size(value, SIZES[:2], "a model-parallel unit with get_model_parallel_world_size()")
    return value


def _tp_group(value: Any) -> Any:
    world_size(value, SIZES[2:], "a torch.distributed process group")
    return value


def _group(value: Any) -> int:
    """The number of ranks of a process group."""
    return world_size(value, SIZES[2:], "a torch.distributed process group")


def choice(*names: str) -> Kind:
    """One of these strings."""

    def read(value: Any) -> str:
        if isinstance(value, str) and value in names:
            return value
        raise ValueError(f"one of {', '.join(map(repr, names))}")

    return Kind(" or ".join(f"`{name!r}`" for name in names), read)


FLAG = Kind("bool", lambda value: _instance(value, bool, "True or False"))
INTEGER = Kind("int", _integer)
COUNT = Kind("int >= 1", _count)
COUNTS = Kind("int >= 1 or list of them", _counts)
TEXT = Kind("str", _text)
NAME = Kind("str, not empty", _name)
PATH = Kind("path", _path)
MAPPING = Kind("dict", _mapping)
SECTION = Kind("object", _mapping)
CHECKPOINT = Kind("path or dict", lambda value: _path(value) if isinstance(value, os.PathLike) else value)
CERTIFY = Kind("bool or dict", _certify)
DTYPE = Kind("torch.dtype or str", read_dtype)
DEVICE = Kind("torch.device or str", _device)
POLICY = Kind("dict {layer class: policy}", read_policies)
MPU = Kind("model-parallel unit", _mpu)
TP_GROUP = Kind("process group", _tp_group)
GROUP = Kind("process group", _group)
ANYTHING = Kind("any", lambda value: value)
