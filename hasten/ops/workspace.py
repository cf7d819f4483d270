"""Memory that kernels share between calls, owned by whoever makes the calls.

A kernel whose programs count each other in needs counters that are zero when it starts, and leaves them zero when it
ends. Inside `with workspace:` it takes them from there, so that no fill is launched before each call; two owners never
share any, so that two models or two streams cannot meet in them.
"""

from __future__ import annotations

from contextvars import ContextVar, Token

import torch
from torch import Tensor

_current: ContextVar[Workspace | None] = ContextVar("workspace", default=None)


class Workspace:
    """Counters of one stream of calls. Enter it around them; what was handed out lives as long as it does."""

    def __init__(self) -> None:
        self._counters: dict[torch.device, Tensor] = {}
        self._outgrown: list[Tensor] = []  # a captured graph may still count in them
        self._tokens: list[Token[Workspace | None]] = []

    def __enter__(self) -> Workspace:
        self._tokens.append(_current.set(self))
        return self

    def __exit__(self, *error: object) -> None:
        _current.reset(self._tokens.pop())

    def counters(self, count: int, device: torch.device) -> Tensor:
        """int32 (at least `count`,), all zero between calls."""
        held = self._counters.get(device)
        if held is None or len(held) < count:
            if held is not None:
                self._outgrown.append(held)
            held = self._counters[device] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        return held


def counters(count: int, device: torch.device) -> Tensor:
    """Zeroed int32 counters that a kernel leaves zeroed: the current workspace's, or fresh ones outside of any."""
    held = _current.get()
    return torch.zeros(count, dtype=torch.int32, device=device) if held is None else held.counters(count, device)
