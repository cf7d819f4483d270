"""Checkpoints split over tensor-parallel ranks under the model's own names (type ds_model of DeepSpeed-Inference)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.checkpoints.files import Opened, few, together
from hasten.checkpoints.joining import Joined, Share, Whole, along, first, unequal
from hasten.checkpoints.source import Entry
from hasten.errors import ConfigError, WeightError
from hasten.weights import SEQUENTIAL, Binding, Param

Shares = Mapping[str, Sequence[Share]]


@dataclass(frozen=True, slots=True)
class Cut:
    """How ranks share a tensor: evenly along `axis`, each of several parts behind each other there for itself.

    parts: their sizes in proportion, without common factor.
    """

    axis: int
    parts: tuple[int, ...] = (1,)


class Split:
    """A Source that does not know how its tensors are cut: `fitted` to the shapes of a model it does.

    Until then entries are those of the first rank's shares.
    """

    def __init__(self, origin: str, shares: Shares) -> None:
        self.origin, self._shares = origin, shares
        self.entries: dict[str, Entry] = {n: s[0].entry for n, s in shares.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        return self._shares[name][0].read(index)

    def fitted(self, shape: Callable[[str], Sequence[int] | None], cuts: Mapping[str, Cut]) -> Joined:
        """The whole tensors: what has the model's shape is alike on all ranks, what is smaller is joined.

        shape: of the model's tensor that a stored name means. cuts: of stored names that are joined in parts.
        """
        return Joined(self.origin, {n: _whole(s, shape(n), cuts.get(n)) for n, s in self._shares.items()})


def _whole(shares: Sequence[Share], want: Sequence[int] | None, cut: Cut | None) -> Whole:
    have = shares[0].entry.shape
    if want is None or len(have) != len(want) or tuple(want) == have:
        return first(shares)
    short = [i for i, (a, b) in enumerate(zip(have, want, strict=True)) if a < b]
    if len(short) != 1 or unequal(shares, short[0]):
        return first(shares)
    fits = cut is not None and cut.axis == short[0]
    return along(short[0], shares, cut.parts if cut and fits else (1,))


def open_split(
    origin: str, files: Sequence[Path], shared: Sequence[Path], ranks: int, start: Callable[[Path], Opened],
    splits: Mapping[str, Any] | None,
) -> Split | Joined:  # fmt: skip
    """The source of split files: piece after piece, in each the files of all ranks, and of files that ranks share.

    splits: how each tensor is cut, where the writer says it. Raises WeightError with everything that is wrong.
    """
    shares, problems = _listed(files, shared, ranks, start)
    for name, several in shares.items():
        if len(several) not in (1, ranks):
            problems.append(f"{name}: {len(several)} of {ranks} ranks have it ({several[0].entry.file})")
    if problems:
        raise WeightError(together(f"{origin} cannot be loaded", problems))
    if splits is None:
        return Split(origin, shares)
    cuts = _cuts(origin, splits)
    wholes: dict[str, Whole] = {}
    for name, several in shares.items():
        cut = cuts.get(name)
        try:
            if cut and len(several) < ranks:
                raise ValueError(f"{len(several)} of {ranks} ranks have it")
            if cut and (different := unequal(several, cut.axis)):
                raise ValueError(f"shares do not go together: {different}")
            wholes[name] = along(cut.axis, several, cut.parts) if cut else first(several)
        except (ValueError, IndexError) as e:
            problems.append(f"{name} ({several[0].entry.file}): {e}")
    if absent := [n for n in cuts if n not in shares]:
        problems.append(f"no file holds {few(absent)}, which the description says how to join")
    if problems:
        raise WeightError(together(f"{origin} cannot be loaded", problems))
    return Joined(origin, wholes)


def _listed(
    files: Sequence[Path], shared: Sequence[Path], ranks: int, start: Callable[[Path], Opened]
) -> tuple[dict[str, list[Share]], list[str]]:
    found: dict[str, list[Share]] = {}
    problems: list[str] = []
    for path in (*files, *shared):
        if not path.is_file():
            problems.append(f"{path}: there is no such file")
            continue
        try:
            opened = start(path)
        except WeightError as e:
            problems.append(str(e))
            continue
        for name, entry in opened.entries.items():
            if path in shared and name in found:
                problems.append(f"{name} is in {path} and in {found[name][0].entry.file}")
            found.setdefault(name, []).append(Share(entry, partial(opened.read, name)))
    return found, problems


def _cuts(origin: str, splits: Mapping[str, Any]) -> dict[str, Cut]:
    cuts: dict[str, Cut] = {}
    odd: list[str] = []
    for name, said in splits.items():
        match said:
            case [int(axis), [*parts]] if axis >= 0 and parts and all(type(n) is int and n > 0 for n in parts):
                cuts[name] = Cut(axis, tuple(parts))
            case _:
                odd.append(f"{name}: {said!r:.40}")
    if odd:
        raise ConfigError(f"the description in {origin}: splits must give [axis, [parts]] by name, not {few(odd)}")
    return cuts


def cuts_of(bindings: Sequence[Binding], ranks: int = 1) -> dict[str, Cut]:
    """How `ranks` share each stored tensor, by the role of its parameter; those that all have whole are left out."""
    return {n: cut for b in bindings for n, cut in _bound(b) if _divides(b.param, ranks)}


def _bound(b: Binding) -> Iterator[tuple[str, Cut]]:
    p = b.param
    turned = p.slot in b.dialect.transposed and p.kind == "weight"
    stacked = 1 if p.stack and len(b.keys) == 1 else 0
    if p.role in ("columns", "expert_columns"):
        yield from ((n, Cut(stacked + (0 if turned else 1))) for n in b.keys)
    elif p.role in ("rows", "expert_rows"):
        apart = len(b.keys) == 1 and b.dialect.packing(p) is SEQUENTIAL
        parts = tuple(n // gcd(*p.parts) for n in p.parts) if apart else (1,)
        yield from ((n, Cut(stacked + (1 if turned else 0), parts)) for n in b.keys)


def _divides(p: Param, ranks: int) -> bool:
    """Whether every rank gets as many heads of every part."""
    sizes = p.columns if p.role in ("columns", "expert_columns") else p.parts
    return all(n // p.unit % ranks == 0 for n in sizes) and not any(p.absent)
