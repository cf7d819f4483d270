"""What every checkpoint is to those who read it: names and shapes at once, tensors one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor, known without reading it. `file` is where errors say that it came from."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


@runtime_checkable
class Source(Protocol):
    """A checkpoint whose tensors are known by name and shape, and read one by one."""

    @property
    def origin(self) -> str:
        """The folder or file that the user named."""
        ...

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every tensor by its stored name."""
        ...

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """The tensor, or the part of it that `index` (a slice for each of the first axes) cuts out.

        It has the stored dtype, lies in the host's memory or in a mapped file, and is to be copied, not written to.
        Raises WeightError with file and tensor where it cannot be read.
        """
        ...


class StateDict:
    """A Source of tensors that are in memory, such as what `module.state_dict()` gives."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: str = "the state dict") -> None:
        self.tensors, self.origin = tensors, origin
        self.entries = {n: Entry(tuple(t.shape), t.dtype, origin) for n, t in tensors.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        return self.tensors[name].detach()[index or ...]
