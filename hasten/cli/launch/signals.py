"""Signals that end a run, as values: nothing is interrupted, so that nothing is left half started or half ended."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def ending() -> Iterator[list[int]]:
    """The list that every such signal goes into; afterwards they do again what they did."""
    caught: list[int] = []
    before = {s: signal.getsignal(s) for s in ENDING}
    listen(caught)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen(caught: list[int]) -> None:
    for number in ENDING:
        signal.signal(number, lambda n, _: caught.append(n))
