"""What the device can do at best, measured: how fast memory is read, how fast matrices are multiplied."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hasten.bench.cost import Cost


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second, and operations a second by dtype."""

    memory: float
    matrix: Mapping[torch.dtype, float]

    def share(self, costs: Sequence[Cost], dtype: torch.dtype, seconds: float) -> tuple[float, str, float]:
        """What was attained in phases that cost this: the rate, its unit, and how near that is to the limit.

        The limit of each phase is the nearer ceiling's; the unit is that of the ceiling which limits them longer.
        """
        reading = [c.bytes / self.memory for c in costs]
        multiplying = [c.flops / self.matrix[dtype] for c in costs]
        limits = [max(pair) for pair in zip(reading, multiplying, strict=True)]
        share = sum(limits) / seconds
        by_memory = sum(limit for limit, r in zip(limits, reading, strict=True) if limit == r)
        if by_memory >= sum(limits) / 2:
            return sum(c.bytes for c in costs) / seconds / 1e9, "GB/s", share
        return sum(c.flops for c in costs) / seconds / 1e12, "TFLOP/s", share


def measure(device: torch.device, dtypes: Iterable[torch.dtype]) -> Ceilings:
    """The ceilings of a device; a second or two."""
    found = Ceilings(copied(device) if device.type == "cuda" else read(), {d: multiplied(device, d) for d in dtypes})
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def memory(device: torch.device, known: Ceilings) -> float:
    """Bytes a second now: a processor's memory is shared with others, and its speed changes by the minute."""
    return read() if device.type == "cpu" else known.memory


def copied(device: torch.device) -> float:
    """Bytes a second that a copy within the device's memory moves, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / _median(lambda: target.copy_(source), device, 20)


def read(seconds: float = 0.5) -> float:
    """Bytes a second that all threads together read from the processor's memory, best of what fits the time."""
    block = torch.ones(2**26)  # 256 MiB, far more than any cache
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        block.sum()
        best = max(best, block.numel() * 4 / (time.perf_counter() - start))
    return best


def multiplied(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of two large square matrices of random numbers."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    return 2 * n**3 / _median(lambda: a @ b, device, 20 if device.type == "cuda" else 3)


def _median(call: Callable[[], Any], device: torch.device, runs: int) -> float:
    """Seconds of a call, behind a warm-up."""
    times = []
    for _ in range(runs + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
