"""Whole tensors of the shares that ranks keep, cut or put together only as far as somebody reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from hasten.checkpoints.files import first_line
from hasten.checkpoints.source import Entry
from hasten.errors import WeightError

Read = Callable[[tuple[slice, ...]], Tensor]
"""A stored tensor: the part of it that slices of its first axes cut out, all of it where there are none."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank keeps of a tensor."""

    entry: Entry
    read: Read


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows of a whole tensor, `start:stop` of one share. Rows are counted along the axis of the cut."""

    share: Share
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor of runs that follow each other along `axis`."""

    axis: int
    runs: tuple[Run, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.runs[0].share.entry.shape
        rows = sum(r.rows for r in self.runs)
        return tuple(rows if i == self.axis else n for i, n in enumerate(first))

    @property
    def entry(self) -> Entry:
        first = self.runs[0].share.entry
        return Entry(self.shape, first.dtype, first.file)

    def read(self, index: tuple[slice, ...] = ()) -> Tensor:
        """The part that `index` cuts out, from the shares in which it lies; a view of one where it lies in one.

        Slices have no steps.
        """
        if not self.shape:
            return self.runs[0].share.read(())
        full = (*index, *(slice(None) for _ in self.shape[len(index) :]))
        start, stop, _ = full[self.axis].indices(self.shape[self.axis])
        ends = accumulate(r.rows for r in self.runs)
        wanted: list[tuple[Run, int, int]] = []
        for run, end in zip(self.runs, ends, strict=True):
            low, high = max(start, end - run.rows), min(stop, end)
            if low < high:
                shift = run.start - (end - run.rows)
                wanted.append((run, low + shift, high + shift))
        if len(wanted) <= 1:
            run, low, high = wanted[0] if wanted else (self.runs[0], 0, 0)
            return run.share.read(self._around(full, low, high))
        made: Tensor | None = None
        at = 0
        for run, low, high in wanted:  # one after the other, so that no two shares are in memory beside the whole
            t = run.share.read(self._around(full, low, high))
            if made is None:
                made = t.new_empty([*t.shape[: self.axis], stop - start, *t.shape[self.axis + 1 :]])
            made.narrow(self.axis, at, high - low).copy_(t)
            at += high - low
        assert made is not None
        return made

    def _around(self, full: tuple[slice, ...], low: int, high: int) -> tuple[slice, ...]:
        return (*full[: self.axis], slice(low, high), *full[self.axis + 1 :])


def first(shares: Sequence[Share]) -> Whole:
    """What every rank has alike: the first one's."""
    shape = shares[0].entry.shape
    return Whole(0, (Run(shares[0], 0, shape[0] if shape else 1),))


def along(axis: int, shares: Sequence[Share], parts: Sequence[int] = (1,)) -> Whole:
    """Shares put behind each other along `axis`.

    parts: the sizes, in proportion, of several tensors that stand behind each other in every share ([gate | up]): they
    are put together each for itself. ValueError where a share cannot be cut so.
    """
    cuts = [_cuts(s.entry.shape[axis], parts) for s in shares]
    return Whole(
        axis, tuple(Run(s, *cut[part]) for part in range(len(parts)) for s, cut in zip(shares, cuts, strict=True))
    )


def _cuts(rows: int, parts: Sequence[int]) -> list[tuple[int, int]]:
    unit, rest = divmod(rows, sum(parts))
    if rest:
        raise ValueError(f"{rows} rows are no multiple of {sum(parts)}")
    ends = [unit * n for n in accumulate(parts)]
    return [(end - unit * n, end) for end, n in zip(ends, parts, strict=True)]


def unequal(shares: Iterable[Share], axis: int | None) -> str:
    """How shares of one tensor contradict each other in shape or dtype; empty where they go together.

    axis: the one along which they may differ.
    """
    entries = [s.entry for s in shares]
    rest = {tuple(n for i, n in enumerate(e.shape) if i != axis) for e in entries}
    ranks = {len(e.shape) for e in entries}
    if len(rest) > 1 or len(ranks) > 1:
        return ", ".join(f"{e.shape} in {e.file}" for e in entries)
    if len({e.dtype for e in entries}) > 1:
        return ", ".join(f"{e.dtype} in {e.file}".replace("torch.", "") for e in entries)
    return ""


def tensor_share(t: Tensor, file: str) -> Share:
    """A share in memory, or in a mapped file."""
    return Share(Entry(tuple(t.shape), t.dtype, file), lambda index: t.detach()[index or ...])


class Joined:
    """A Source of whole tensors that lie in pieces."""

    def __init__(self, origin: str, wholes: Mapping[str, Whole]) -> None:
        self.origin, self._wholes = origin, wholes
        self.entries = {n: w.entry for n, w in wholes.items()}
        self.files = frozenset(r.share.entry.file for w in wholes.values() for r in w.runs)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        try:
            return self._wholes[name].read(index)
        except WeightError:
            raise
        except Exception as e:  # readers of files raise errors of every class
            raise WeightError(f"{self.entries[name].file}: {name} cannot be read: {first_line(e)}") from e
