"""Checkpoints in files: one, or shards with an index that says which tensor is where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from hasten.checkpoints.source import Entry
from hasten.errors import WeightError

Shards = Mapping[Path, tuple[str, ...]]
"""Files, and the tensors that an index promises in each; none are promised where there is no index."""


class Opened(Protocol):
    """One file of a checkpoint, open: what it holds, and tensors of it."""

    entries: Mapping[str, Entry]

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor: ...


class Files:
    """A Source of files of one format. `start` opens a file, or raises WeightError with its path.

    One file is open at a time, so that a mapping ends when the next file's begins.
    """

    def __init__(self, origin: Path, shards: Shards, start: Callable[[Path], Opened]) -> None:
        """Raises WeightError with every file that is missing or damaged and every tensor that a file lacks."""
        self.origin, self._start = str(origin), start
        self.entries: dict[str, Entry] = {}
        self._open: tuple[str, Opened] | None = None
        problems: list[str] = []
        for file, promised in shards.items():
            problems += self._list(file, promised)
        for file, promised in shards.items():  # what an index says goes before what else lies in a shard
            problems += [f"{file}: no tensor {n}, which the index says it holds" for n in self._lacks(file, promised)]
        if problems:
            raise WeightError(problems[0] if len(problems) == 1 else together(f"{origin} cannot be loaded", problems))

    def _list(self, file: Path, promised: tuple[str, ...]) -> Iterator[str]:
        if not file.is_file():
            what = f", which holds {few(promised)} by the index" if promised else ""
            yield f"{file}: there is no such file{what}"
            return
        try:
            held = self._start(file).entries
        except WeightError as e:
            yield str(e)
            return
        listed = set(promised)
        self.entries |= {n: e for n, e in held.items() if n in listed or n not in self.entries}

    def _lacks(self, file: Path, promised: tuple[str, ...]) -> list[str]:
        if not any(e.file == str(file) for e in self.entries.values()):
            return []  # the file itself was the problem
        return [n for n in promised if n not in self.entries or self.entries[n].file != str(file)]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        file = self.entries[name].file
        if self._open is None or self._open[0] != file:
            self._open = None
            self._open = file, self._start(Path(file))
        try:
            return self._open[1].read(name, index)
        except Exception as e:  # readers of files raise errors of every class
            raise WeightError(f"{file}: {name} cannot be read: {first_line(e)}") from e


def read_index(path: Path) -> Shards:
    """The files that an index (*.index.json) names, beside it, with the tensors of each.

    Raises WeightError for what is no index.
    """
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for tensor, file in places.items():
            shards.setdefault(str(Path(file)), []).append(str(tensor))
    except OSError as e:
        raise WeightError(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise WeightError(
            f"{path} is no index of a checkpoint (a JSON object with weight_map, {{tensor: file}}): {first_line(e)}"
        ) from e
    outside = sorted(file for file in shards if Path(file).name != file)
    if outside or not shards:
        raise WeightError(f"{path} names " + (f"files outside its folder: {few(outside)}" if shards else "no tensors"))
    return {path.parent / file: tuple(names) for file, names in shards.items()}


def together(what: str, problems: list[str]) -> str:
    """One message of all problems."""
    if len(problems) == 1:
        return f"{what}: {problems[0]}"
    return "\n  ".join([f"{what}, {len(problems)} problems:", *problems])


def few(names: tuple[str, ...] | list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or ['no reason given'])[0]}"
