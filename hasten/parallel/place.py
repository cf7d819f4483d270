"""Where one process stands among those that hold a model together."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.parallel.group import Group


@dataclass(frozen=True, slots=True)
class Place:
    """tensor: the processes that split every layer between them. stages: those that hold layers one after the other.

    None: this process does so alone.
    """

    tensor: Group | None = None
    stages: Group | None = None
