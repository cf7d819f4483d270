"""Which tokens run next, and in which pages: integers in, integers out, no tensors, no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hasten.errors import RequestError
from hasten.runtime.pages import Pages
from hasten.runtime.request import Request


@dataclass(eq=False, slots=True)
class Sequence:
    """One completion on its way.

    |---- cached: keys and values lie in `pages` ----|---- still to run ----|
    0                                             cached               len(tokens)
    """

    request: Request
    sample: int = 0  # which of the request's n completions
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    begun: int = 0  # how long it was when the first of its cached tokens ran

    def __post_init__(self) -> None:
        self.tokens = self.tokens or list(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def spoken(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[len(self.request.prompt) :]


@dataclass(frozen=True, slots=True)
class Row:
    """A run of one sequence's tokens: tokens[start:stop] go through the model next, prompt or new."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        return self.stop == len(self.sequence.tokens)


class Scheduler:
    """Runs the oldest first and restarts the youngest when pages run out, so that the oldest always gets on.

    budget: tokens in one pass. restarts: lengths beyond which what a shorter sequence cached is void (LongRope).
    promise: ask for neighbouring pages. Completions of one prompt share no pages: each runs the prompt itself. A
    sequence is admitted where all it has fits, so that what gave way for an older one does not come back at once.
    """

    def __init__(
        self,
        pages: Pages,
        page_size: int,
        budget: int,
        *,
        restarts: frozenset[int] = frozenset(),
        promise: bool = False,
    ) -> None:
        self.pages, self.page_size, self.budget = pages, page_size, budget
        self.restarts, self.promise = restarts, promise
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, s: Sequence) -> None:
        """Queue a sequence; RequestError if all the pages there are could not hold it."""
        need = self._most(s)
        if need > self.pages.limit:
            r = s.request
            raise RequestError(
                f"prompt {r.index}: {len(r.prompt)} tokens and {r.sampling.max_new_tokens} new ones need {need} pages "
                f"of {self.page_size} tokens; the memory limit allows {self.pages.limit}"
            )
        self.waiting.append(s)

    def next(self) -> list[Row]:
        """Rows of one pass: what running sequences have to run, then as much of the waiting ones as fits."""
        rows, budget = [], self.budget
        for s in self.running.copy():
            n = min(self._due(s), budget) if s in self.running else 0
            if n and self._reserve(s, s.cached + n, preempt=True):
                rows.append(self._row(s, n))
                budget -= n
        while self.waiting and budget and self._count(len(self.waiting[0].tokens)) <= self.pages.free:
            s = self.waiting.popleft()
            n = min(len(s.tokens), budget)
            self._reserve(s, n, preempt=False)
            self.running.append(s)
            rows.append(self._row(s, n))
            budget -= n
        return rows

    def advance(self, rows: list[Row]) -> None:
        """The rows' tokens are cached now."""
        for row in rows:
            row.sequence.cached = row.stop

    def finish(self, s: Sequence) -> None:
        """Take a sequence out, wherever it is, and its pages back."""
        if s in self.running:
            self.running.remove(s)
        elif s in self.waiting:
            self.waiting.remove(s)
        self._release(s)

    def clear(self) -> None:
        """Take every sequence out."""
        for s in [*self.running, *self.waiting]:
            self.finish(s)

    def _due(self, s: Sequence) -> int:
        if s.cached and any(s.begun <= length < len(s.tokens) for length in self.restarts):
            s.cached = 0  # its pages will be written again
        return len(s.tokens) - s.cached

    def _row(self, s: Sequence, n: int) -> Row:
        if s.cached == 0:
            s.begun = len(s.tokens)
        return Row(s, s.cached, s.cached + n)

    def _most(self, s: Sequence) -> int:
        return self._count(s.request.limit - 1)  # the last token is never looked back at

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _reserve(self, s: Sequence, tokens: int, *, preempt: bool) -> bool:
        need = self._count(tokens) - len(s.pages)
        if need <= 0:
            return True
        while preempt and need > self.pages.free and self.running[-1] is not s:
            youngest = self.running.pop()
            self._release(youngest)
            self.waiting.appendleft(youngest)
        return self.pages.take(s, s.pages, need, promise=self._most(s) if self.promise else 0)

    def _release(self, s: Sequence) -> None:
        self.pages.release(s, s.pages)
        s.cached = 0
