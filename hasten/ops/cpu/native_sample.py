"""Greedy choices through the compiled kernels: a row of logits is too little work to wake torch's threads for."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.ops.cpu.library import Library, load
from hasten.ops.cpu.native import NUMBERS
from hasten.ops.sample import Choice, sample

MOST = 2**20
"""Logits that one thread looks through."""


def greedy(logits: Tensor, c: Choice, uniform: Tensor | None, prompts: Tensor | None, generated: Tensor | None) -> bool:
    """Whether every row takes its likeliest token, there is one, and there are few numbers to look at."""
    if c.temperature is not None or c.penalizes or logits.dtype not in NUMBERS:
        return False
    return 0 < logits.numel() <= MOST and logits.stride(1) == 1


def choose(native: Library, logits: Tensor) -> Tensor:
    """`sample` of rows that take the likeliest, by the library."""
    rows, columns = logits.shape
    best = torch.empty(rows, dtype=torch.int64)
    native.likeliest(
        *(native.level, NUMBERS[logits.dtype], rows, columns, logits.data_ptr(), logits.stride(0), best.data_ptr())
    )
    return best


if isinstance(found := load(), Library):

    @sample.register("native", devices="cpu", accepts=greedy)
    def _(
        logits: Tensor, c: Choice, uniform: Tensor | None, prompts: Tensor | None, generated: Tensor | None
    ) -> Tensor:
        assert isinstance(found, Library)
        return choose(found, logits)
