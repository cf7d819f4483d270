"""Work that is recorded once and then repeated: on CUDA, one graph for all launches of a decode step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")

TURN = 0.035
"""Seconds of work that are handed over at once: rare enough to cost the host nothing, still a fluent stream."""

UNKNOWN = 8
"""Steps to begin with, while none has been timed."""


class Unrecordable(Exception):
    """This work cannot be recorded, for the reason given; nothing else is affected."""


class Recorder(Protocol):
    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """What does the work again, on whatever its tensors hold by then; what it returned is overwritten each time.

        The work may be done in order to record it. Raises Unrecordable.
        """
        ...

    def steps(self, seconds: float | None) -> int:
        """How many steps to hand over at once if one takes so long; None: not known yet."""
        ...


class Graphs:
    """Records CUDA graphs. They share one pool of memory, since no two of them ever run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._broken: list[torch.cuda.CUDAGraph] = []
        self._first: torch.cuda.CUDAGraph | None = None
        self._begin()

    def _begin(self) -> None:
        self._first = None
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()  # compiles and loads kernels, and finds how large workspaces must be
                self._stream.synchronize()
                return self._captured(work)
        except torch.OutOfMemoryError as error:
            raise Unrecordable("the device has no memory left for it") from error
        finally:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _captured(self, work: Callable[[], T]) -> Callable[[], T]:
        graph = torch.cuda.CUDAGraph()
        try:
            with _uncollected():
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = work()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self._broken.append(graph)  # the allocator may still ask it which allocations are its own
            self._begin()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise Unrecordable(str(error).partition("\n")[0]) from error
        self._first = self._first or graph  # a pool whose last graph goes is gone, and no graph can be recorded into it

        def again() -> T:
            graph.replay()
            return result

        return again

    def steps(self, seconds: float | None) -> int:
        return UNKNOWN if seconds is None else max(1, round(TURN / seconds))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which may free what a capture does not allow to be freed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
