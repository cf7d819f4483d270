"""Prompts and pieces of prompts, recorded, beside sequences with one new token: launching them takes the host long."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from hasten import ops
from hasten.model import Transformer
from hasten.runtime.fixed import Fixed, Kept, choosing
from hasten.runtime.sampler import Columns
from hasten.runtime.scheduler import Row
from hasten.runtime.transfer import numbers

MOST_TOKENS = 2048
"""Above, the device has enough to do."""

PADDING = {64: 16, 256: 32, MOST_TOKENS: 256}
"""Up to so many tokens, what their number is a multiple of."""


def padded(tokens: int) -> int:
    """How many tokens a record for so many has: few different numbers, and little to compute for nothing."""
    step = next(step for most, step in PADDING.items() if tokens <= most)
    return -(-tokens // step) * step


def sizes(most: int) -> list[int]:
    """The numbers of tokens that there are records for, up to what `most` tokens need."""
    return sorted({padded(tokens) for tokens in range(1, min(most, MOST_TOKENS) + 1)})


def known(row: Row) -> array[int]:
    """The row's tokens, int64; 0 for one that is still to come."""
    tokens = array("q", row.sequence.tokens[row.start : row.stop])
    return tokens + array("q", [0]) * (row.stop - row.start - len(tokens))


def slots(row: Row, size: int) -> array[int]:
    """Where the row's tokens are kept, in pages of `size` tokens, int64: a piece for each run of neighbours."""
    pages, first, last = row.sequence.pages, row.start // size, (row.stop - 1) // size
    found, begun = array("q"), first
    for i in range(first, last + 1):
        if i == last or pages[i + 1] != pages[i] + 1:
            found += numbers(pages[begun] * size, (pages[i] + 1) * size)
            begun = i + 1
    return found[row.start - first * size : row.stop - first * size]


def joined(parts: Iterable[array[int]]) -> array[int]:
    """One behind the other."""
    whole = array("q")
    for part in parts:
        whole += part
    return whole


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
                "ids": joined(map(known, rows)),
                "positions": joined(numbers(row.start, row.stop) for row in rows),
                "slots": joined(slots(row, size) for row in rows),
                "lengths": [row.stop for row in rows],
                "tables": self.page_tables(rows),
                "starts": [0, *ends, *[ends[-1] if ends else 0] * (self.places - len(rows))],
                "sampled": [end - 1 for row, end in zip(rows, ends, strict=True) if row.samples],
                **choosing(sampling, steps, self.places, columns),
            }
        )

    def logits(self, model: Transformer) -> Tensor:
        """What the model says behind the runs that sample, (places, vocabulary): those first."""
        return model.predict(self.run(model, self.at["sampled"]))

    def step(self, model: Transformer, columns: Columns) -> None:
        """Choose a token for each run that samples, and say it."""
        uniform = self.at["uniform"].view(-1) if columns else None
        self.said[0].copy_(ops.sample(self.logits(model), self.choice(columns), uniform, None, None))
