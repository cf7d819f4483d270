"""Processes in rows and columns as one group, and one process as a group of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hasten.parallel.group import Group


@dataclass(frozen=True, slots=True)
class Alone:
    """The group of one process: nothing has to be exchanged."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, t: Tensor) -> Tensor:
        return t

    def all_gather(self, t: Tensor) -> Tensor:
        return t

    def share(self, value: Any) -> Any:
        return value


@dataclass(frozen=True, slots=True)
class Joint:
    """All processes of a grid, numbered row by row: `columns` are those of this one's row, `rows` of its column."""

    columns: Group
    rows: Group

    @property
    def rank(self) -> int:
        return self.rows.rank * self.columns.size + self.columns.rank

    @property
    def size(self) -> int:
        return self.rows.size * self.columns.size

    def all_reduce(self, t: Tensor) -> Tensor:
        return self.rows.all_reduce(self.columns.all_reduce(t))

    def all_gather(self, t: Tensor) -> Tensor:
        return self.rows.all_gather(self.columns.all_gather(t))

    def share(self, value: Any) -> Any:
        return self.rows.share(self.columns.share(value))
