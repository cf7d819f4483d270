"""Where the time of a call goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiling

from hasten.bench.timing import timed

SHOWN = 40  # characters of a kernel's name


@dataclass(frozen=True, slots=True)
class Share:
    """One kernel, or one op on a processor: how often it ran, and its seconds in all."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What ran in a call that takes `wall` seconds where nobody looks, the longest first."""

    wall: float
    shares: tuple[Share, ...]

    def markdown(self, title: str, most: int = 20) -> str:
        """A table of the `most` that took longest. Kernels may overlap: their sum can exceed the whole."""
        busy = sum(s.seconds for s in self.shares)
        head = f"### {title}\n\n{self.wall * 1e3:,.2f} ms; the kernels' own times add up to {busy * 1e3:,.2f} ms\n"
        lines = ["| kernel | calls | us each | ms in all | of the whole |", "| --- | --: | --: | --: | --: |"]
        for s in self.shares[:most]:
            each, share = s.seconds / s.calls * 1e6, s.seconds / self.wall
            lines.append(f"| `{s.name[:SHOWN]}` | {s.calls} | {each:,.2f} | {s.seconds * 1e3:,.2f} | {share:.1%} |")
        return "\n".join([head, *lines, ""])


def profile(call: Callable[[], Any], device: torch.device) -> Profile:
    """Watch a call that has run before."""
    gpu = device.type == "cuda"
    wall = timed(call)
    with profiling(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as watched:
        timed(call)
    time = "self_device_time_total" if gpu else "self_cpu_time_total"
    shares = (Share(e.key, e.count, getattr(e, time) / 1e6) for e in watched.key_averages())
    ordered = sorted((s for s in shares if s.seconds > 0), key=lambda s: -s.seconds)
    return Profile(wall, tuple(ordered))
