"""Tensors from files to where they are wanted: to a GPU by several threads, through pinned memory.

A file that is mapped is memory like any other, but a GPU fetches from pages that may move at a fraction of what its bus
carries, and waits for each. So threads copy pieces into pinned buffers of their own, two each, and the GPU fetches one
while the other is filled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

THREADS = 8
PIECE = 8 * 2**20  # bytes


class Lane:
    """One thread's stream and its two pinned buffers, each with the moment from which it may be filled again."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)  # of this thread
        self.stream = torch.cuda.Stream(device)
        self._buffers = [(torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]

    @torch.no_grad()
    def move(self, to: Tensor, what: Tensor, ready: torch.cuda.Event) -> None:
        """`ready`: when `to` is free to be written."""
        buffer, free = self._buffers[0]
        self._buffers.reverse()
        free.synchronize()
        flat = _bytes(what)
        staged = buffer[: flat.numel()].view(flat.shape)
        np.copyto(staged.numpy(), flat.numpy())  # without the interpreter's lock, and in this thread alone
        staged = staged.view(what.dtype).view(what.shape)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            straight = to.is_contiguous() and to.dtype == what.dtype
            to.copy_(staged if straight else staged.to(to.device, non_blocking=True), non_blocking=True)
            free.record(self.stream)


class Copies:
    """`copy(to, what)`, begun at once and done when `wait` returns, or the context is left without an error.

    What is on the host goes to `device`, where that is a GPU, by threads; anything else is copied on the spot. Tensors
    that are copied from must keep their values until then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = ThreadPoolExecutor(THREADS, "hasten-copies") if device.type == "cuda" else None
        self._own, self._lanes = threading.local(), list[Lane]()
        self._begun: list[Future[None]] = []

    def __call__(self, to: Tensor, what: Tensor) -> None:
        if self._threads is None or to.device.type != "cuda" or what.device.type != "cpu":
            to.copy_(what)
            return
        ready = torch.cuda.Event()
        ready.record()
        for mine, theirs in pieces(to, what):
            self._begun.append(self._threads.submit(self._move, mine, theirs, ready))

    def wait(self) -> None:
        """Until everything has been copied; raises the first error of a copy."""
        begun, self._begun = self._begun, []
        for f in begun:
            f.result()
        for lane in self._lanes:
            lane.stream.synchronize()

    def _move(self, to: Tensor, what: Tensor, ready: torch.cuda.Event) -> None:
        lane = getattr(self._own, "lane", None)
        if lane is None:
            lane = self._own.lane = Lane(self._device)
            self._lanes.append(lane)
        lane.move(to, what, ready)

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            for f in self._begun:
                f.cancel()
            if self._threads is not None:
                self._threads.shutdown()


def pieces(to: Tensor, what: Tensor, most: int = PIECE) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors cut alike, along as many axes as it takes for no piece of `what` to have more than `most` bytes."""
    size = what.numel() * what.element_size()
    if size <= most:
        yield to, what
        return
    axis = next(i for i, n in enumerate(what.shape) if n > 1)
    step = max(1, what.shape[axis] * most // size)
    for mine, theirs in zip(to.split(step, axis), what.split(step, axis), strict=True):
        yield from pieces(mine, theirs, most)


def _bytes(t: Tensor) -> Tensor:
    """The same memory as bytes, rows kept apart where they lie apart."""
    t = t if t.ndim and t.stride(-1) == 1 else t.contiguous().reshape(t.shape or (1,))
    return t.view(torch.uint8)
