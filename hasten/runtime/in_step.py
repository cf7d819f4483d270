"""Ranks that generate together take the same decisions: each runs the scheduler itself, on the same requests.

What could differ from one rank to another, its free memory, how long its steps take, what torch's generator gives, is
agreed on first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from hasten.parallel import Group
from hasten.runtime.graphs import Recorder, Unrecordable
from hasten.runtime.request import Request

T = TypeVar("T")


def least(value: int, over: Group | None, device: torch.device) -> int:
    """The smallest value that any rank gives."""
    if over is None:
        return value
    return int(over.all_gather(torch.tensor([value], device=device)).min())


def seeded(made: list[Request], over: Group | None) -> list[Request]:
    """The requests with the seeds of rank 0, if they have any that their sampling does not name."""
    drawn = [r for r in made if not r.sampling.greedy and r.sampling.seed is None]
    if over is None or not drawn:
        return made
    return [replace(r, seed=seed) for r, seed in zip(made, over.share([r.seed for r in made]), strict=True)]


class InStep:
    """Records where every rank can, and hands over as many steps at once as on every rank."""

    def __init__(self, recorder: Recorder, over: Group, device: torch.device) -> None:
        self._recorder, self._over, self._device = recorder, over, device

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        record, why = None, ""
        try:
            record = self._recorder.record(work)
        except Unrecordable as error:
            why = str(error)
        if not least(int(record is not None), self._over, self._device) or record is None:
            raise Unrecordable(why or "another rank cannot record it")
        return record

    def steps(self, seconds: float | None) -> int:
        return self._recorder.steps(None)  # each rank measures another time
