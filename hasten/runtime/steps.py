"""Decode steps whose state stays on the device: each ends by becoming the next one's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten import ops
from hasten.model import Transformer
from hasten.runtime.fixed import Fixed, Kept, choosing
from hasten.runtime.sampler import Columns
from hasten.runtime.scheduler import Row

MOST = 128
"""Steps that can follow each other without the host."""


class Steps(Fixed):
    """Sequences with one new token each; `said` int64 (MOST, places) is what up to MOST steps made of them."""

    def __init__(self, places: int, pages: int, kept: Kept) -> None:
        more = {"count": (torch.int32, (1,)), "uniform": (torch.float64, (MOST, places))}
        # attention that serves steps and prompts alike is told where each sequence begins
        self._starts: dict[str, Sequence[float]] = {"starts": range(places + 1)} if ops.is_invariant() else {}
        more |= {name: (torch.int32, (places + 1,)) for name in self._starts}
        super().__init__(places, places, pages, kept, more)
        self.said = torch.empty(MOST, places, dtype=torch.int64, device=self.device)

    def place(self, rows: Sequence[Row], steps: int, columns: Columns) -> None:
        """Put sequences into the first places for up to `steps` steps."""
        size = self.kept.pools.page_size
        last = [row.stop - 1 for row in rows]
        pages = [row.sequence.pages for row in rows]
        self.fill(
            {
                "ids": [row.sequence.tokens[-1] for row in rows],
                "positions": last,
                "slots": [held[p // size] * size + p % size for held, p in zip(pages, last, strict=True)],
                "lengths": [row.stop for row in rows],
                "tables": self.page_tables(rows),
                **self._starts,
                **choosing(rows, steps, self.places, columns),
            }
        )

    def logits(self, model: Transformer) -> Tensor:
        """What the model says behind the token of each place, (places, vocabulary)."""
        return model.predict(self.run(model))

    def step(self, model: Transformer, columns: Columns) -> None:
        """Choose a token for each place, say it, and make it the next input."""
        at = self.at
        # first, since a launch between those of the model would keep the next one from starting early
        uniform = at["uniform"].index_select(0, at["count"]).view(-1) if columns else None
        tokens = ops.sample(self.logits(model), self.choice(columns), uniform, None, None)
        state = at["ids"], at["positions"], at["lengths"], at["slots"], at["tables"]
        ops.advance(tokens, *state, self.kept.pools.page_size, self.said, at["count"])
