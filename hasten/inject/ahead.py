"""Checks that the device answers: asked before the work, read after it was handed over, so that nothing waits for them.

A check begins where it is cheap to ask and comes back as a function that waits for its answer alone and raises what is
wrong. Whoever starts work that bad input could harm (a device assert ends the process's use of the device, a cache is
changed) calls `settle` first; who replays a recording, which is safe with any input, calls it behind the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Check = Callable[[], None]
_open: ContextVar[list[Check]] = ContextVar("checks")


@contextmanager
def checked(checks: Iterable[Check]) -> Iterator[None]:
    """The call inside belongs to these checks. When it ends, they have been settled, also if it failed."""
    begun: list[Check] = []
    token = _open.set(begun)
    try:
        begun.extend(checks)
        yield
    finally:
        _open.reset(token)
        _settle(begun)


def settle() -> None:
    """Wait for what the current call's checks say: the first that fails raises."""
    _settle(_open.get([]))


def _settle(begun: list[Check]) -> None:
    while begun:
        begun.pop(0)()


def fetch(x: Tensor) -> Callable[[], list[int]]:
    """Begin to copy a small tensor (n,) to the host; the function that comes back waits for that copy and no more."""
    if not x.is_cuda:
        return x.tolist
    here, arrived = x.to("cpu", non_blocking=True), torch.cuda.Event()  # such a copy goes to pinned memory
    arrived.record(torch.cuda.current_stream(x.device))

    def wait() -> list[int]:
        arrived.synchronize()
        return here.tolist()

    return wait
