"""Ranks that are threads of one process: the same collectives without sockets, so that many sizes cost little."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

PATIENCE = 60.0  # seconds


class Threads:
    """One rank of a group of threads; `said` is what all of them said last."""

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.said, self.barrier = rank, len(said), said, barrier
        self.exchanges = 0

    def _all(self, value: Any) -> list[Any]:
        self.exchanges += 1
        self.said[self.rank] = value
        self.barrier.wait(PATIENCE)
        heard = list(self.said)
        self.barrier.wait(PATIENCE)
        return heard

    def all_reduce(self, t: Tensor) -> Tensor:
        assert t.is_contiguous()
        return t.copy_(torch.stack([x.clone() for x in self._all(t.clone())]).sum(0))

    def all_gather(self, t: Tensor) -> Tensor:
        return torch.cat(self._all(t), -1)

    def share(self, value: Any) -> Any:
        return self._all(value)[0]


def run(size: int, function: Callable[[Threads], Any]) -> list[Any]:
    """What function(group) gives in each of `size` threads, without gradients; the first error if any raises."""
    said, barrier = [None] * size, threading.Barrier(size)

    def rank(r: int) -> Any:
        try:
            with torch.no_grad():
                return function(Threads(r, said, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank, r) for r in range(size)]
    errors = [e for f in futures if (e := f.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [f.result() for f in futures]
