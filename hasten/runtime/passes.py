"""What has been started on the device, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from hasten.runtime.request import Chosen
from hasten.runtime.sampler import Choosing
from hasten.runtime.scheduler import Row
from hasten.runtime.scheduler import Sequence as Line
from hasten.runtime.transfer import Download, Moment, upload


class Pass(Protocol):
    """Rows that go through the model; asking for what they made waits for it."""

    lines: Sequence[Line]  # of the rows that sample
    steps: int

    @property
    def last(self) -> Tensor | None:
        """int64 (lines,), on the device: the last new token of each; None where there are none."""
        ...

    def tokens(self) -> list[list[int]]:
        """The new ones of each line; -1 where the logits were not numbers."""
        ...

    def scores(self) -> list[Chosen] | None:
        """What is known of them, where that is more: of each line, which has then one new token."""
        ...


class Single:
    """One new token at most of each row."""

    steps = 1

    def __init__(self, lines: Sequence[Line], choosing: Choosing | None) -> None:
        self.lines, self._choosing = lines, choosing
        self.last = None if choosing is None else choosing.tokens
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

    def __init__(self, lines: Sequence[Line], said: Tensor, start: Moment, timed: Callable[[float], None]) -> None:
        self.lines, self.steps = lines, len(said)
        self._start, self._timed = start, timed
        self._download = Download(said)
        self.last = said[-1].clone()  # whoever runs next may say something else there

    def tokens(self) -> list[list[int]]:
        (said,) = self._download.tensors()
        self._timed(self._download.end.since(self._start) / self.steps)
        return said.T.tolist()

    def scores(self) -> None:
        return None


def carry(work: Pass, rows: Sequence[Row], ids: Tensor) -> None:
    """Put what a pass under way says last where the next one reads it: ids (tokens,) of these rows, end to end."""
    places = {line: place for place, line in enumerate(work.lines)}
    ends = accumulate(row.stop - row.start for row in rows)
    behind = [(places[s], end - 1) for s, end in zip((row.sequence for row in rows), ends, strict=True) if s.coming]
    if behind:
        assert work.last is not None, "a line is of a row that samples"
        sources, targets = upload(
            [i for pair in zip(*behind, strict=True) for i in pair], torch.int64, ids.device
        ).chunk(2)
        ids.index_copy_(0, targets, work.last.index_select(0, sources).clamp_(min=0))
