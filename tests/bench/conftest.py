"""Engines that answer at once, and ceilings that nobody has to measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hasten.bench.ceilings import Ceilings


class Recorder:
    """An engine that notes what it is asked for."""

    def __init__(self, pace: int = 1, fails: str = "") -> None:
        self.pace, self.fails = pace, fails
        self.asked: list[tuple[list[int], list[int]]] = []  # lengths of the prompts, and of what is to follow
        self.encoded: list[dict[str, torch.Tensor]] = []
        self.prepared: list[tuple[int, int]] = []  # sequences, and tokens of each

    def prepare(self, sequences: int, tokens: int) -> None:
        self.prepared.append((sequences, tokens))

    def generate(self, prompts: list[list[int]], new: Sequence[int]) -> Any:
        if self.fails:
            raise RuntimeError(self.fails)
        self.asked.append(([len(p) for p in prompts], list(new)))

    def encode(self, inputs: dict[str, torch.Tensor]) -> Any:
        self.encoded.append(inputs)


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder


@pytest.fixture
def ceilings(monkeypatch: pytest.MonkeyPatch) -> Ceilings:
    """A device that reads 100 GB and does 1 TFLOP in a second."""
    monkeypatch.setattr("hasten.bench.ceilings.read", lambda: 1e11)
    return Ceilings(1e11, dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 1e12))
