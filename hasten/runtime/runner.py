"""Rows through the model: flat ids and positions, pages, logits where a row samples, and tokens out of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hasten.errors import RequestError
from hasten.model import Transformer
from hasten.runtime.paged import Paged, Turns
from hasten.runtime.pools import SHARE, Pools, free_memory
from hasten.runtime.request import Chosen
from hasten.runtime.sampler import Sampler
from hasten.runtime.scheduler import Row
from hasten.spec import Buckets, LongRope, Tokens, Tower


class Runner:
    """One model and the pages of all the sequences that go through it.

    memory_limit: bytes that keys and values may take; half of what is free now where it is None.
    """

    def __init__(self, model: Transformer, *, page_size: int, memory_limit: int | None) -> None:
        serves(model.tower)
        table = model.weights["tokens"]
        self.model, self.device = model, table.device
        memory = int(SHARE * free_memory(table.device)) if memory_limit is None else memory_limit
        self.pools = Pools(model.tower, page_size, table.dtype, table.device, memory)
        self.turns = Turns()
        self.sampler = Sampler(table.device)

    @property
    def restarts(self) -> frozenset[int]:
        """Lengths beyond which the keys of a shorter sequence are void."""
        positions = [b.attention.position for b in self.model.tower.blocks]
        scalings = [getattr(p, "scaling", None) for p in positions]
        return frozenset(s.original for s in scalings if isinstance(s, LongRope))

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> list[Chosen]:
        """A token for each row that samples, in their order; keys and values of all rows go into their pages."""
        self.pools.hold(1 + max(max(row.sequence.pages) for row in rows))
        ids = [t for row in rows for t in row.sequence.tokens[row.start : row.stop]]
        positions = [p for row in rows for p in range(row.start, row.stop)]
        flat = torch.tensor(ids + positions, device=self.device)
        tokens, places = flat.split(len(ids))
        x = self.model.embed(tokens, places)
        x = self.model.blocks(x, Paged(rows, places, self.pools, self.turns))
        last, at = [], -1
        for row in rows:
            at += row.stop - row.start
            last += [at] if row.samples else []
        if not last:
            return []
        if len(last) < len(ids):
            x = x[torch.tensor(last, device=self.device)]
        logits = self.model.logits(self.model.finish(x))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.sampler.choose(logits, [row.sequence for row in rows if row.samples])

    def clear(self) -> None:
        """Give back the memory of pages and tables."""
        self.pools.clear()
        self.turns.clear()


def serves(t: Tower) -> None:
    """RequestError unless the tower is one that pages can serve: tokens in, logits out, looking back at itself only."""
    attentions = [b.attention for b in t.blocks]
    problems = {
        "its embedding takes no token ids": not isinstance(t.embed, Tokens),
        "it has no language model head": t.head is None,
        "it has no blocks": not t.blocks,
        "its attention is not causal": not all(a.causal for a in attentions),
        "its positions are buckets of relative distance": any(isinstance(a.position, Buckets) for a in attentions),
        "it attends to an encoder's output": any(b.cross is not None for b in t.blocks),
    }
    found = [why for why, holds in problems.items() if holds]
    if found:
        raise RequestError(
            f"this model cannot be served from pages: {', '.join(found)}; "
            "transformers' own generate() on the fused backbone serves it"
        )
