"""Prompts and pieces of prompts, recorded, beside sequences with one new token: launching them takes the host long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from hasten import ops
from hasten.model import Transformer
from hasten.runtime.fixed import Fixed, Kept, choosing, known
from hasten.runtime.sampler import Columns
from hasten.runtime.scheduler import Row

MOST_TOKENS = 2048
"""Above, the device has enough to do."""

PADDING = {64: 16, 256: 32, MOST_TOKENS: 256}
"""Up to so many tokens, what their number is a multiple of."""


def padded(tokens: int) -> int:
    """How many tokens a record for so many has: few different numbers, and little to compute for nothing."""
    step = next(step for most, step in PADDING.items() if tokens <= most)
    return -(-tokens // step) * step


def _slots(row: Row, size: int) -> Iterator[range]:
    """Where the row's tokens are kept: a piece of each page of `size` tokens."""
    pages, at = row.sequence.pages, row.start
    while at < row.stop:
        stop = min(at - at % size + size, row.stop)
        first = pages[at // size] * size + at % size
        yield range(first, first + stop - at)
        at = stop


class Runs(Fixed):
    """Sequences with a run of new tokens each, `tokens` in all; `said` int64 (1, places): of those that sample."""

    def __init__(self, tokens: int, places: int, pages: int, kept: Kept) -> None:
        more = {
            "starts": (torch.int32, (places + 1,)),
            "sampled": (torch.int64, (places,)),
            "uniform": (torch.float64, (1, places)),
        }
        super().__init__(tokens, places, pages, kept, more)
        self.said = torch.empty(1, places, dtype=torch.int64, device=self.device)

    def place(self, rows: Sequence[Row], steps: int, columns: Columns) -> None:
        """Put rows into the first places, for one step."""
        size = self.kept.pools.page_size
        ends = list(accumulate(row.stop - row.start for row in rows))
        sampling = [row for row in rows if row.samples]
        self.fill(
            {
                "ids": [*chain.from_iterable(map(known, rows))],
                "positions": [*chain.from_iterable(range(row.start, row.stop) for row in rows)],
                "slots": [*chain.from_iterable(part for row in rows for part in _slots(row, size))],
                "lengths": [row.stop for row in rows],
                "tables": self.page_tables(rows),
                "starts": [0, *ends, *[ends[-1] if ends else 0] * (self.places - len(rows))],
                "sampled": [end - 1 for row, end in zip(rows, ends, strict=True) if row.samples],
                **choosing(sampling, steps, self.places, columns),
            }
        )

    def logits(self, model: Transformer) -> Tensor:
        """What the model says behind the runs that sample, (places, vocabulary): those first."""
        return model.predict(self.run(model).index_select(0, self.at["sampled"]))

    def step(self, model: Transformer, columns: Columns) -> None:
        """Choose a token for each run that samples, and say it."""
        uniform = self.at["uniform"].view(-1) if columns else None
        self.said[0].copy_(ops.sample(self.logits(model), self.choice(columns), uniform, None, None))
