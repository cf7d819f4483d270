"""Timing in turns, and what comes of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Job:
    """What one engine does: calls timed one by one in each turn, what is done once before, and what a profile is of."""

    warm: Call
    calls: tuple[Call, ...]
    sample: Call


@dataclass(frozen=True, slots=True)
class Result:
    """One engine on one piece of work. `value` is the median, in `unit`; least and most are of the same runs.

    attained: how fast that moved the bytes or did the operations that the work cannot do without, in `of`, which is
    `share` of what the device was measured to do.
    """

    work: str
    engine: str
    value: float
    least: float
    most: float
    unit: str
    runs: int
    attained: float | None = None
    of: str | None = None  # GB/s or TFLOP/s
    share: float | None = None


def job(*calls: Call, rounds: int = 1) -> Job:
    """Calls that are their own warm-up, in so many rounds, the last of them the one to look into."""
    return Job(lambda: [call() for _ in range(rounds) for call in calls], calls, calls[-1])


def interleave(
    jobs: Mapping[str, Job], runs: int, *, advance: Callable[[], Any] = lambda: None
) -> tuple[dict[str, list[tuple[float, ...]]], dict[str, Exception]]:
    """Seconds of each job's calls, turn by turn, and why jobs failed that did; `advance` is called after each turn.

    Everybody is warm before anybody is timed. A job that fails is not in the first dictionary.
    """
    failures: dict[str, Exception] = {}
    for name, job in jobs.items():
        try:
            job.warm()
        except Exception as e:  # engines break in ways of their own, and the others are to be measured
            failures[name] = e
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in jobs if name not in failures}
    for turn in range(runs):
        order = list(times) if turn % 2 == 0 else list(times)[::-1]  # whoever runs second inherits a warm cache
        for name in order:
            times[name].append(tuple(timed(call) for call in jobs[name].calls))
            advance()
    return times, failures


def timed(call: Call) -> float:
    """Seconds of one call, the device's work included."""
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def result(work: str, engine: str, values: list[float], unit: str) -> Result:
    """The median of an engine's values and their spread."""
    return Result(work, engine, statistics.median(values), min(values), max(values), unit, len(values))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
