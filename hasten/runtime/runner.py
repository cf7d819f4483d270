"""Rows through the model: flat ids and positions, pages, logits where a row samples, and tokens out of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from hasten import ops
from hasten.errors import RequestError
from hasten.model import Transformer
from hasten.ops.backends import load
from hasten.parallel import Group
from hasten.runtime.decoder import PLACES, Decoder, Plan
from hasten.runtime.fixed import Kept
from hasten.runtime.graphs import Graphs, Recorder
from hasten.runtime.paged import Paged, Slopes, Turns
from hasten.runtime.pages import Pages
from hasten.runtime.passes import Pass, Single
from hasten.runtime.pools import SHARE, Pools, free_memory, page_bytes
from hasten.runtime.sampler import Columns, Sampler
from hasten.runtime.scheduler import Row, Scheduler
from hasten.runtime.stage import Stage
from hasten.runtime.transfer import upload
from hasten.spec import Buckets, LongRope, Tokens, Tower


class Runner:
    """One model and the pages of all the sequences that go through it.

    memory_limit: bytes that keys and values may take; half of what is free now where it is None. recorder: how decode
    steps are recorded, what the device offers where it is None. Where nothing can be recorded, which is on a CPU, pools
    grow as pages come into use. invariant: no row's answer depends on the rows beside it, to the bit.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        page_size: int,
        memory_limit: int | None,
        recorder: Recorder | None = None,
        invariant: bool = False,
    ) -> None:
        serves(model.tower)
        if invariant and model.backends:
            raise RequestError(f"{len(model.backends)} blocks are forced to a backend, so nothing is batch-invariant")
        load()
        self.model, self.device, dtype = model, model.like.device, model.like.dtype
        memory = int(SHARE * free_memory(self.device)) if memory_limit is None else memory_limit
        size = page_bytes(model.tower, page_size, dtype)  # which stages with other blocks have otherwise
        pages = least(memory // size, model.place.everyone, self.device)
        self.pools = Pools(
            model.tower, page_size, dtype, self.device, memory if pages == memory // size else pages * size
        )
        self.turns, self.slopes = Turns(), Slopes()
        self.sampler = Sampler(self.device)
        self.stage = None if model.place.chain is None else Stage(model, model.place.chain, self.sampler)
        self._workspace, self._invariant = ops.Workspace(), invariant
        self.decoder: Decoder | None = None
        if recorder is None and self.device.type == "cuda":
            recorder = Graphs(self.device)
        if recorder is not None:
            self.decoder = Decoder(model, Kept(self.pools, self.turns, self.slopes), self.sampler, recorder, self.stage)
        self.pages = Pages(self.pools.limit if recorder is None else 0)

    def scheduler(self, budget: int) -> Scheduler:
        """A scheduler of sequences in this runner's pages."""
        promise, places = self.device.type == "cpu", None if self.decoder is None else PLACES
        size = self.pools.page_size
        how = {"restarts": self.restarts, "promise": promise, "places": places, "lanes": self.lanes}
        return Scheduler(self.pages, size, budget, **how)

    @property
    def lanes(self) -> int:
        """Passes that are under way at once: as many as keep all stages busy."""
        return 1 if self.model.place.chain is None else self.model.place.chain.size

    @property
    def restarts(self) -> frozenset[int]:
        """Lengths beyond which the keys of a shorter sequence are void."""
        positions = [b.attention.position for b in self.model.tower.blocks]
        scalings = [getattr(p, "scaling", None) for p in positions]
        return frozenset(s.original for s in scalings if isinstance(s, LongRope))

    @torch.inference_mode()
    def reserve(self, needs: Sequence[int]) -> None:
        """Have pages for sequences that need so many each, as far as memory goes: pools that move void all records."""
        if self.decoder is not None:
            used = self.pages.limit - self.pages.free
            most = sum(sorted(needs, reverse=True)[:PLACES])
            there = self.pools.reserve(used + most)
            self.pages.extend(least(there, self.model.place.everyone, self.device))

    @torch.inference_mode()
    def prepare(self, places: int, tokens: int, budget: int, how: Columns | None) -> None:
        """Have pages and records for so many sequences of so many tokens, where anything is recorded."""
        if self.decoder is not None:
            self.reserve([-(-tokens // self.pools.page_size)] * places)
            with self._around():
                self.decoder.prepare(places, tokens, budget, how)

    def plan(self, rows: Sequence[Row], *, behind: bool = False) -> Plan | None:
        """How these rows can run from a record, if they can. behind: a pass that is not waited for."""
        return None if self.decoder is None else self.decoder.plan(rows, behind=behind)

    @torch.inference_mode()
    def start(self, rows: Sequence[Row], plan: Plan | None = None, steps: int = 1) -> Pass:
        """Begin to run the rows, `steps` times if as planned; keys and values go into their pages."""
        with self._around():
            begun = None if self.decoder is None or plan is None else self.decoder.start(plan, steps, None)
            return self._once(rows) if begun is None else begun

    @torch.inference_mode()
    def follow(self, work: Pass, plan: Plan, steps: int) -> Pass | None:
        """Begin them behind a pass that is not waited for, if a record is there for them."""
        with self._around():
            return None if self.decoder is None else self.decoder.start(plan, steps, work)

    @contextmanager
    def _around(self) -> Iterator[None]:
        """What every pass and every recording runs inside."""
        rule = ops.invariant() if self._invariant else nullcontext()
        with self._workspace, torch.cuda.device_of(self.model.like), rule:
            yield

    def _once(self, rows: Sequence[Row]) -> Pass:
        self.pools.hold(1 + max(max(row.sequence.pages) for row in rows))
        ids = [t for row in rows for t in row.sequence.tokens[row.start : row.stop]]
        positions = [p for row in rows for p in range(row.start, row.stop)]
        last, at = [], -1
        for row in rows:
            at += row.stop - row.start
            last += [at] if row.samples else []
        flat = upload(ids + positions + last, torch.int64, self.device)
        tokens, places, sampled = flat.split([len(ids), len(ids), len(last)])
        lines, stage = [row.sequence for row in rows if row.samples], self.stage
        x, ctx = self.model.embed(tokens, places), Paged(rows, places, self.pools, self.turns, self.slopes)
        if stage is not None:
            x, moving = stage.through(x, ctx)
            return stage.choose(x[sampled] if len(last) < len(ids) else x, lines, moving)
        x = self.model.blocks(x, ctx, rows=sampled if 0 < len(last) < len(ids) else None)
        if not last:
            return Single([], None)
        return Single(lines, self.sampler.choose(self.model.predict(x), lines))

    def clear(self) -> None:
        """Give back the memory of pages and tables."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a burst that nobody waits for may still write into them
        self.pools.clear()
        self.turns.clear()
        if self.decoder is not None:
            self.decoder.forget()


def least(own: int, over: Group | None, device: torch.device) -> int:
    """The smallest number that a rank has: ranks make the same decisions, so none may count on more."""
    return own if over is None else int(over.all_gather(torch.tensor([own], device=device)).min())


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
