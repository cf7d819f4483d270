"""What has been started on the device, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from hasten.runtime.request import Chosen
from hasten.runtime.sampler import Choosing
from hasten.runtime.scheduler import Row
from hasten.runtime.scheduler import Sequence as Line
from hasten.runtime.transfer import Download, Moment


class Pass(Protocol):
    """Rows that go through the model; asking for what they made waits for it."""

    rows: Sequence[Row]
    lines: Sequence[Line]  # of the rows that sample
    steps: int

    def tokens(self) -> list[list[int]]:
        """The new ones of each line; -1 where the logits were not numbers."""
        ...

    def scores(self) -> list[Chosen] | None:
        """What is known of them, where that is more: of each line, which has then one new token."""
        ...


class Single:
    """One new token at most of each row."""

    steps = 1

    def __init__(self, rows: Sequence[Row], lines: Sequence[Line], choosing: Choosing | None) -> None:
        self.rows, self.lines, self._choosing = rows, lines, choosing
        self._chosen: list[Chosen] | None = None

    def tokens(self) -> list[list[int]]:
        return [[c.token] for c in self.scores()]

    def scores(self) -> list[Chosen]:
        if self._chosen is None:
            self._chosen = [] if self._choosing is None else self._choosing.chosen()
        return self._chosen


class Burst:
    """Several new tokens of each row.

    said (steps, rows that sample): the tokens, made by steps that began at `start`. timed: is told what one step took.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        lines: Sequence[Line],
        said: Tensor,
        start: Moment,
        timed: Callable[[float], None],
    ) -> None:
        self.rows, self.lines, self.steps = rows, lines, len(said)
        self._start, self._timed = start, timed
        self._download = Download(said)

    def tokens(self) -> list[list[int]]:
        (said,) = self._download.tensors()
        self._timed(self._download.end.since(self._start) / self.steps)
        return said.T.tolist()

    def scores(self) -> None:
        return None
