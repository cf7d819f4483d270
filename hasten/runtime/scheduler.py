"""Which tokens run next, and in which pages: integers in, integers out, no tensors, no clock."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from hasten.errors import RequestError
from hasten.runtime.pages import Pages
from hasten.runtime.request import Request

HOLD = 3
"""Passes for which prompts that could start wait, at most, for others to start with them."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One completion on its way.

    |---- cached: keys and values lie in `pages` ----|---- still to run ----|
    0                                             cached                  length

    The last `coming` tokens are under way: passes that have begun will say them.
    """

    request: Request
    sample: int = 0  # which of the request's n completions
    tokens: list[int] = field(default_factory=list)
    coming: int = 0
    cached: int = 0
    pages: array[int] = field(default_factory=lambda: array("i"))  # as page tables have it
    begun: int = 0  # how long it was when the first of its cached tokens ran
    limit: int = field(init=False)  # tokens at which it is done
    ended: bool = False

    def __post_init__(self) -> None:
        self.limit = self.request.limit
        self.tokens = self.tokens or list(self.request.prompt)

    @property
    def length(self) -> int:
        return len(self.tokens) + self.coming

    @property
    def generated(self) -> int:
        return self.length - len(self.request.prompt)

    @property
    def spoken(self) -> list[int]:
        """The generated tokens that are known."""
        return self.tokens[len(self.request.prompt) :]

    def hear(self, tokens: list[int]) -> None:
        """What was coming is known now."""
        self.tokens += tokens
        self.coming -= len(tokens)


@dataclass(frozen=True, slots=True)
class Row:
    """A run of one sequence's tokens: tokens[start:stop] go through the model next, prompt or new, and what the
    sequence says behind them is sampled where these are all. Only the last of them may be still to come."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool


class Scheduler:
    """Runs the oldest first and restarts the youngest when pages run out, so that the oldest always gets on.

    budget: tokens in one pass. restarts: lengths beyond which what a shorter sequence cached is void (LongRope).
    promise: ask for neighbouring pages. places: sequences that run at once, if that has a limit. lanes: passes under
    way at once, each with its part of the sequences, of which none runs while a token of it is coming. Completions of
    one prompt share no pages: each runs the prompt itself. A sequence is admitted where all it has fits, so that what
    gave way for an older one does not come back at once.
    """

    def __init__(
        self,
        pages: Pages,
        page_size: int,
        budget: int,
        *,
        restarts: frozenset[int] = frozenset(),
        promise: bool = False,
        places: int | None = None,
        lanes: int = 1,
    ) -> None:
        self.pages, self.page_size, self.budget = pages, page_size, budget
        self.restarts, self.promise, self.places, self.lanes = restarts, promise, places, lanes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._held = 0  # passes for which somebody could have started

    def add(self, s: Sequence) -> None:
        """Queue a sequence; RequestError if all the pages there are could not hold it."""
        need = self.most(s)
        if need > self.pages.limit:
            r = s.request
            raise RequestError(
                f"prompt {r.index}: {len(r.prompt)} tokens and {r.sampling.max_new_tokens} new ones need {need} pages "
                f"of {self.page_size} tokens; the memory limit allows {self.pages.limit}"
            )
        self.waiting.append(s)

    def next(self) -> list[Row]:
        """Rows of one pass: what running sequences have to run, then as much of the waiting ones as fits."""
        rows, budget, most = list[Row](), self.budget, self._share()
        place = 0
        while place < len(self.running) and len(rows) < most:  # those behind may be made to wait
            s = self.running[place]
            place += 1
            n = min(self._due(s), budget) if self._ready(s) else 0
            if n and self._reserve(s, s.cached + n, preempt=True):
                rows.append(self._row(s, n))
                budget -= n
        if 0 < len(rows) == self.budget - budget and self._holds():  # one token each, no prompt
            self._held += 1
            return rows
        self._held = 0
        while budget and len(rows) < most and self._admits():
            s = self.waiting.popleft()
            assert not s.coming, "what gave way for an older one does not come back at once"
            n = min(s.length, budget)
            self._reserve(s, n, preempt=False)
            self.running.append(s)
            rows.append(self._row(s, n))
            budget -= n
        return rows

    def ahead(self, rows: list[Row], most: int) -> int:
        """How many steps, at most `most`, these rows of one token each can go on by themselves: their pages are taken.

        A sequence that ends on the way runs on for nothing, so no row goes on behind the last end. Nobody waits who
        could have started, and nothing is taken from anybody for more than one step.
        """
        steps = min(most, max(row.sequence.limit - row.stop for row in rows))
        while steps > 1:
            lacking = [(s, n) for s, n in ((row.sequence, self._lacks(row, steps)) for row in rows) if n > 0]
            if sum(n for _, n in lacking) <= self.pages.free:
                for s, n in lacking:
                    self.pages.take(s, s.pages, n)
                break
            steps //= 2
        return steps

    def advance(self, rows: Iterable[Row], steps: int) -> None:
        """So many steps of the rows have begun: what runs in them counts as cached, what they will say as coming.

        A sequence whose last token is coming leaves, with its pages: who gets them writes behind all that has begun.
        """
        for row in rows:
            s = row.sequence
            new = min(steps, s.limit - row.stop) if row.samples else 0
            s.coming += new
            s.cached = row.stop + max(new - 1, 0)  # each but the last has gone through the model again
            if s.length == s.limit:
                self.running.remove(s)
                self._release(s)

    def finish(self, s: Sequence) -> None:
        """Take a sequence out, wherever it is, and its pages back."""
        if s in self.running:
            self.running.remove(s)
        elif s in self.waiting:
            self.waiting.remove(s)
        s.ended = True
        self._release(s)

    def clear(self) -> None:
        """Take every sequence out."""
        for s in [*self.running, *self.waiting]:
            self.finish(s)

    def most(self, s: Sequence) -> int:
        """Pages that the sequence may come to need."""
        return self._count(s.limit - 1)  # the last token is never looked back at

    def _holds(self) -> bool:
        """Whether prompts that could start wait for others: a pass is dear where its prompts are few.

        Only while half of the places are at work, more wait than there are places, and what could start is little.
        """
        if self.places is None or not self._admits() or 2 * len(self.running) < self.places or self._held == HOLD:
            return False
        free = self.places - len(self.running)
        return len(self.waiting) > free and 2 * sum(s.length for s in islice(self.waiting, free)) < self.budget

    def _admits(self) -> bool:
        if not self.waiting or not self._ready(self.waiting[0]):
            return False
        if self.places is not None and len(self.running) >= self.places:
            return False
        return self._count(self.waiting[0].length) <= self.pages.free

    def _share(self) -> int:
        """Sequences of one pass, at most: a lane's part of those that could run at once."""
        alive = len(self.running) + len(self.waiting)
        return -(-min(alive, self.places or alive) // self.lanes)

    def _ready(self, s: Sequence) -> bool:
        """Whether all is known that a pass of the sequence needs, where passes do not hand it to each other."""
        return self.lanes == 1 or not s.coming

    def _due(self, s: Sequence) -> int:
        if self.restarts and s.cached and any(s.begun <= length < s.length for length in self.restarts):
            s.cached = 0  # its pages will be written again
        return s.length - s.cached

    def _row(self, s: Sequence, n: int) -> Row:
        if s.cached == 0:
            s.begun = s.length
        return Row(s, s.cached, s.cached + n, s.cached + n == s.length)

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _lacks(self, row: Row, steps: int) -> int:
        """Pages more than it has that a row of one token needs for so many steps."""
        return self._count(row.stop + steps - 1) - len(row.sequence.pages)

    def _reserve(self, s: Sequence, tokens: int, *, preempt: bool) -> bool:
        need = self._count(tokens) - len(s.pages)
        if need <= 0:
            return True
        while preempt and need > self.pages.free and self.running[-1] is not s:
            youngest = self.running.pop()
            self._release(youngest)
            self.waiting.appendleft(youngest)
        return self.pages.take(s, s.pages, need, promise=self.most(s) if self.promise else 0)

    def _release(self, s: Sequence) -> None:
        self.pages.release(s, s.pages)
        s.cached = 0
