"""Safetensors files, mapped: a slice is read without the tensor around it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hasten.checkpoints.files import few, first_line
from hasten.checkpoints.source import Entry
from hasten.errors import WeightError


class Safetensors:
    """One open safetensors file."""

    def __init__(self, path: Path) -> None:
        """Raises WeightError for what is no whole safetensors file, with the tensors that are cut off."""
        try:
            self._file = safe_open(str(path), framework="pt", device="cpu")
            self.entries = {n: self._entry(n, str(path)) for n in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise WeightError(f"{path} is no whole safetensors file: {_cut(path) or first_line(e)}") from e

    def _entry(self, name: str, file: str) -> Entry:
        stored = self._file.get_slice(name)
        shape = tuple(stored.get_shape())
        nothing = stored[:0] if shape else self._file.get_tensor(name)
        return Entry(shape, nothing.dtype, file)

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        return self._file.get_slice(name)[index] if index else self._file.get_tensor(name)


def _cut(path: Path) -> str:
    """Which tensors lie beyond the end of a file; empty where its header cannot tell."""
    # | 8 bytes: length of the header | header, JSON | tensors, at offsets from here |
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            header = json.loads(file.read(length)) if length < size else {}
        ends = {n: 8 + length + t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    beyond = [n for n, end in ends.items() if end > size]
    return f"it ends after {size} bytes of {max(ends.values())}, and cuts off {few(beyond)}" if beyond else ""
