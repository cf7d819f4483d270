"""Files of torch.save, mapped and restricted to what torch's own allow-list of classes can hold."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.checkpoints.files import few, first_line
from hasten.checkpoints.source import Entry
from hasten.errors import WeightError

STAND_INS = (
    "argparse.Namespace",
    "megatron.",
    "deepspeed.",
    "transformer_engine.",
    "apex.",
    "numpy.",
    "io.BytesIO",
    "_io.BytesIO",
)
"""Classes (or with a dot behind, packages) of what training leaves beside weights. None of their code is run."""


class Record:
    """What stands in for an object whose class is not loaded: its fields as attributes, or `parts`.

    A global that is called when it is unpickled becomes one, too: with the arguments of the call.
    """

    def __init__(self, *parts: object) -> None:
        self.parts: tuple[object, ...] = parts

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.parts = state if isinstance(state, tuple) else (state,)


def fields_of(value: object) -> Mapping[str, Any]:
    """What a namespace holds that a Record stands in for, or a mapping; empty for anything else."""
    return value if isinstance(value, Mapping) else dict(getattr(value, "__dict__", {}))


def load(path: Path) -> object:
    """What a file of torch.save holds, its tensors mapped, and Records for objects of training (STAND_INS).

    Raises WeightError for a file that is damaged, or that names anything else that torch does not allow.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # loading tells what is wrong with it
        names = []
    inert = [n for n in names if n in STAND_INS or any(s.endswith(".") and n.startswith(s) for s in STAND_INS)]
    allowed: list[Any] = [(type("Record", (Record,), {}), n) for n in inert]
    with torch.serialization.safe_globals(allowed):
        return _load(path)


class Pickle:
    """One open file of torch.save that holds a state dict."""

    def __init__(self, path: Path) -> None:
        """Raises WeightError for a file that is damaged, old, or holds anything but tensors by name."""
        content = _load(path)
        if not isinstance(content, Mapping):
            raise WeightError(f"{path} holds no state dict but a {type(content).__name__}")
        odd = [f"{n} ({type(t).__name__})" for n, t in content.items() if not _plain(n, t)]
        if odd:
            raise WeightError(f"{path} holds more than dense tensors by name: {few(odd)}")
        self._tensors: dict[str, Tensor] = {n: t.detach() for n, t in content.items()}
        self.entries = {n: Entry(tuple(t.shape), t.dtype, str(path)) for n, t in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        return self._tensors[name][index or ...]


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        # torch's own message advises to load the file without protection
        raise WeightError(
            f"{path} is refused: its pickle holds more than tensors, and could run code: {_culprit(e)}"
        ) from e
    except Exception as e:  # what a damaged archive raises depends on where it is damaged
        if "_use_new_zipfile_serialization" in str(e):
            raise WeightError(
                f"{path} is no archive of torch.save: it is damaged, or older than torch 1.6, whose files cannot be "
                "mapped (load it and save it again)"
            ) from e
        raise WeightError(f"{path} is damaged: {first_line(e)}") from e


def _culprit(e: Exception) -> str:
    """The sentence of torch's message that names what it does not allow."""
    said = str(e).rpartition("WeightsUnpickler error:")[2] or "an object of a class that is not allowed"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    line = next((line for line in lines if "GLOBAL" in line or "nsupported" in line), lines[0])
    return line.partition(" Please use ")[0]


def _plain(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
