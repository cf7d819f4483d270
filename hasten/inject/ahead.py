"""Checks that the device answers, so that nothing waits for them but who has to.

Whoever starts work that bad input could harm (a device assert ends the process's use of the device, a cache is changed)
calls `settle` first. Who replays a recording, which is safe with any input, has the recording find the answer as well,
or calls `begin` in front of the replay; either way `settle` behind it waits for the answer, and not for the replay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

Check = Callable[[], None]
T = TypeVar("T")
_open: ContextVar[list[Check]] = ContextVar("checks")


class checked:
    """The call inside belongs to these checks. When it ends, they have been settled, also if it failed."""

    def __init__(self, checks: Iterable[Check]) -> None:
        self._begun: list[Check] = []
        self._checks = checks

    def __enter__(self) -> None:
        self._token = _open.set(self._begun)
        try:
            self._begun.extend(self._checks)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        _open.reset(self._token)
        _settle(self._begun)


def settle() -> None:
    """Wait for what the current call's checks say: the first that fails raises."""
    _settle(_open.get([]))


def _settle(begun: list[Check]) -> None:
    while begun:
        begun.pop(0)()


class Extremes:
    """The smallest and the largest number of x, found on its device and sent to the host.

    recorded: `find` goes into a CUDA graph, and every replay of that finds them anew.
    """

    def __init__(self, x: Tensor, recorded: bool = False) -> None:
        self._x, self._arrived, self._side = x, None, None
        self._there = torch.empty(2, dtype=x.dtype, device=x.device)
        self._here = torch.empty(2, dtype=x.dtype, pin_memory=x.is_cuda)
        if x.is_cuda:
            # an external event is a node of the graph, so that the host can wait for the middle of a replay
            self._arrived = torch.cuda.Event(external=True) if recorded else torch.cuda.Event()
            # a priority of its own: streams of the common one are shared with others, whose work would be recorded
            self._side = torch.cuda.Stream(x.device, priority=-1) if recorded else None

    def find(self) -> None:
        """Ask the device, behind what its current stream has to do."""
        torch.aminmax(self._x, out=(self._there[0], self._there[1]))  # one launch
        self._here.copy_(self._there, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._x.device))

    def beside(self, compute: Callable[..., T]) -> Callable[..., T]:
        """`compute`, and to be recorded with it, on a branch of its own, `find`."""

        def both(*inputs: Tensor | None) -> T:
            if self._side is None:
                self.find()
                return compute(*inputs)
            main = torch.cuda.current_stream(self._x.device)
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                self.find()
            made = compute(*inputs)
            main.wait_stream(self._side)
            return made

        return both

    def read(self) -> list[int]:
        """Wait for the answer to the last question, and for no other work."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here.tolist()


class Range:
    """A check of the smallest and the largest number of x: `judge` raises if they are wrong."""

    def __init__(self, x: Tensor, judge: Callable[[int, int], None]) -> None:
        self._x, self._judge = x, judge
        self._read: Callable[[], list[int]] | None = None

    def begin(self) -> None:
        """Ask the device, unless it has been asked."""
        if self._read is None:
            found = Extremes(self._x)
            found.find()
            self._read = found.read

    def tell(self, extremes: list[int]) -> None:
        """What somebody else has found."""
        self._read = lambda: extremes

    def __call__(self) -> None:
        self.begin()
        assert self._read is not None
        self._judge(*self._read())

    def about(self, x: Tensor) -> bool:
        """Whether x is the same memory, in whatever shape."""
        y = self._x
        same = x.data_ptr() == y.data_ptr() and x.dtype == y.dtype and x.numel() == y.numel()
        return same and x.is_contiguous() and y.is_contiguous()


def asked(x: Tensor | None) -> bool:
    """Whether a check of the current call is about x, and a recording of that can find the answer."""
    return x is not None and any(c.about(x) for c in _ranges()) and (not x.is_cuda or _external())


def pending() -> bool:
    """Whether the current call has checks of its tensors."""
    return bool(_ranges())


def begin(besides: Tensor | None) -> None:
    """Ask the device what the current call's checks want to know, but for those about one tensor."""
    for c in _ranges():
        if besides is None or not c.about(besides):
            c.begin()


def tell(x: Tensor, extremes: list[int]) -> None:
    """The smallest and the largest number of x, to the current call's checks about it."""
    for c in _ranges():
        if c.about(x):
            c.tell(extremes)


def _ranges() -> list[Range]:
    return [c for c in _open.get([]) if isinstance(c, Range)]


@lru_cache(1)
def _external() -> bool:
    """Whether this release of torch lets the host wait for a part of a graph."""
    return "external" in inspect.signature(torch.cuda.Event.__new__).parameters
