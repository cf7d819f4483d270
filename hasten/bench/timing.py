"""Timing in turns, and what is told of it."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Result:
    """One engine on one piece of work. `value` is the median, in `unit`; least and most are of the same runs."""

    work: str
    engine: str
    value: float
    least: float
    most: float
    unit: str
    runs: int


def interleave(
    calls: Mapping[str, Callable[[], Any]], runs: int, *, advance: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every call, in turns, one warm-up each left out; `advance` is called after each timed call."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs):
        order = list(calls) if turn % 2 == 0 else list(calls)[::-1]  # whoever runs second inherits a warm cache
        for name in order:
            _wait()
            start = time.perf_counter()
            calls[name]()
            _wait()
            times[name].append(time.perf_counter() - start)
            advance()
    return times


def summarize(work: str, times: Mapping[str, list[float]], unit: str, amount: float | None) -> list[Result]:
    """Results in `amount` units a second, or in milliseconds where there is no amount."""
    results = []
    for engine, seconds in times.items():
        values = [t * 1e3 if amount is None else amount / t for t in seconds]
        results.append(Result(work, engine, statistics.median(values), min(values), max(values), unit, len(values)))
    return results


def bandwidth(seconds: float = 1.0) -> float:
    """GB/s that all threads together read from memory, best of what fits the time: the limit of a one-token step."""
    block = torch.ones(2**26)  # 256 MiB, far more than any cache
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        block.sum()
        best = max(best, block.numel() * 4 / (time.perf_counter() - start))
    return best / 1e9


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import transformers

    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "bandwidth_gb_s": round(bandwidth(), 1),
    }


def markdown(results: list[Result], about: Mapping[str, Any]) -> str:
    """A table, and the machine under it."""
    lines = ["| work | engine | median | least | most | unit |", "| --- | --- | --: | --: | --: | --- |"]
    lines += [f"| {r.work} | {r.engine} | {r.value:.1f} | {r.least:.1f} | {r.most:.1f} | {r.unit} |" for r in results]
    return "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in about.items() if v is not None), ""])


def plain(results: list[Result], about: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON."""
    return {"machine": dict(about), "results": [asdict(r) for r in results]}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return f.readlines()
    except OSError:
        return []
