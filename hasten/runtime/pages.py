"""Which pages are free. Integers only: what lies in a page is the pools' business."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, MutableSequence
from dataclasses import dataclass


@dataclass(slots=True)
class Hole:
    """Free pages start to stop - 1. `promised`: the owner that others leave them to while there are others."""

    start: int
    stop: int
    promised: Hashable | None = None

    def __len__(self) -> int:
        return self.stop - self.start


class Pages:
    """Hands out pages 0 to limit - 1, low ones first, so that the pools behind them grow no further than they must.

    An owner may be promised the neighbours of its first page. A promise costs nothing: the pages stay free, and who
    finds no others takes them. It keeps a sequence's pages side by side, where a slice of the pool is the whole cache.
    """

    def __init__(self, limit: int) -> None:
        self.limit = self.free = limit
        self._holes = [Hole(0, limit)] if limit else []

    def extend(self, limit: int) -> None:
        """Hand out more pages from now on, up to `limit` - 1, if that is more."""
        if limit > self.limit:
            self._holes.append(Hole(self.limit, limit))
            self.free += limit - self.limit
            self.limit = limit

    def take(self, owner: Hashable, held: MutableSequence[int], count: int, *, promise: int = 0) -> bool:
        """Append `count` pages to the owner's `held`, or none at all and False. promise: pages it hopes to have."""
        if count > self.free:
            return False
        if not held and promise > count:
            self._promise(owner, promise)
        self.free -= count
        while count:
            hole = self._best(owner, held[-1] + 1 if held else 0)
            n = min(count, len(hole))
            if hole.promised in (None, owner):
                held.extend(range(hole.start, hole.start + n))
                hole.start += n
            else:  # its end is what the promise needs last
                held.extend(range(hole.stop - n, hole.stop))
                hole.stop -= n
            if not len(hole):
                self._holes.remove(hole)
            count -= n
        return True

    def release(self, owner: Hashable, held: MutableSequence[int]) -> None:
        """Take back all that the owner holds, and what it was promised."""
        self.free += len(held)
        for hole in self._holes:
            if hole.promised == owner:
                hole.promised = None
        self._holes += _runs(held)
        del held[:]
        self._holes.sort(key=lambda hole: hole.start)
        merged: list[Hole] = []
        for hole in self._holes:
            if merged and merged[-1].promised is hole.promised is None and merged[-1].stop == hole.start:
                merged[-1].stop = hole.stop
            else:
                merged.append(hole)
        self._holes = merged

    def _best(self, owner: Hashable, next_page: int) -> Hole:
        """Promised to the owner, else behind its last page, else nobody's lowest, else another's highest."""
        behind = lowest = None
        for hole in self._holes:
            if hole.promised == owner:
                return hole
            if hole.promised is None:
                lowest = lowest or hole
                behind = hole if hole.start == next_page else behind
        return behind or lowest or self._holes[-1]

    def _promise(self, owner: Hashable, count: int) -> None:
        for at, hole in enumerate(self._holes):
            if hole.promised is None and len(hole) >= count:
                self._holes.insert(at, Hole(hole.start, hole.start + count, owner))
                hole.start += count
                if not len(hole):
                    self._holes.remove(hole)
                return


def _runs(pages: Iterable[int]) -> list[Hole]:
    """Neighbours that follow each other are one hole."""
    runs: list[Hole] = []
    for page in pages:
        if runs and runs[-1].stop == page:
            runs[-1].stop += 1
        else:
            runs.append(Hole(page, page + 1))
    return runs
