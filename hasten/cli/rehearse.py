"""Every kernel that a model can need, found by calling its launchers.

The launchers are called at the sizes between which their rules change; a hook notes what each of them would compile. So
what is compiled follows from the rules, not from a few calls that somebody thought of.
"""

from __future__ import annotations

from itertools import chain, combinations, product

import torch
from torch import Tensor

from hasten import ops
from hasten.model import Transformer
from hasten.model.context import KeysAndValues
from hasten.runtime.decoder import PAGES, PLACES
from hasten.runtime.paged import Slopes
from hasten.runtime.sampler import COLUMNS, FILTERS
from hasten.spec import Attention, Rope, Tokens

ROWS = (*range(1, 17), 17, 24, 32, 33, 48, *range(64, 513, 32), 65, *range(640, 4097, 128), 8192)
"""Tiles are 16 to 128 rows high, and what is split or filled changes with how many there are."""

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Of sequences: splits are powers of two, each of which serves counts up to twice as many."""

POWERS = tuple(2**i for i in range(15))
PAGE = 16
LONGEST = 16384  # tokens of a batch


class Rows:
    """hasten.model.Context of tokens whose keys and values go nowhere: nobody attends to them."""

    def __init__(self, positions: Tensor, pools: list[tuple[Tensor, Tensor]] | None = None) -> None:
        self.positions, self._pools = positions, pools
        self._nowhere = positions - 1

    def turn(self, r: Rope) -> tuple[Tensor, Tensor]:
        cos, sin = torch.zeros(*self.positions.shape, 2 * (r.dim // 2), device=self.positions.device).chunk(2, -1)
        return cos, sin

    def slots(self, i: int) -> ops.Slots | None:
        return None if self._pools is None else ops.Slots(*self._pools[i], self._nowhere)

    def reach(self, a: Attention) -> ops.Reach | None:
        return None

    def attend(
        self, i: int, a: Attention, q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        return q

    def attend_memory(self, i: int, a: Attention, q: Tensor, make: KeysAndValues) -> Tensor:
        raise AssertionError("towers with cross attention are not rehearsed")


def rehearse(model: Transformer) -> None:
    """Call every launcher that passes of the model can reach, at every size that changes what is launched."""
    t = model.tower
    if any(b.cross is not None for b in t.blocks):
        return  # what they need is found out by calling them
    paged = isinstance(t.embed, Tokens) and t.head is not None and all(b.attention.causal for b in t.blocks)
    if paged:
        _decoder(model)
    else:
        _encoder(model)


def _decoder(model: Transformer) -> None:
    table, blocks = model.weights["tokens"], model.tower.blocks
    device, dtype = table.device, table.dtype
    shapes = [(1, PAGE, b.attention.kv_heads, b.attention.head_dim) for b in blocks]
    pools = [(torch.zeros(*s, dtype=dtype, device=device), torch.zeros(*s, dtype=dtype, device=device)) for s in shapes]
    for count in ROWS:
        positions = torch.zeros(count, dtype=torch.int64, device=device)
        x = model.blocks(model.embed(positions, positions), Rows(positions, pools))
        if count <= PLACES:
            model.predict(x)
    for i in {b.attention: i for i, b in enumerate(blocks)}.values():
        _over_pages(blocks[i].attention, *pools[i], model.layers[i].attention.sinks)
    vocabulary = model.predict(x[:1]).shape[1]
    for kind, count in product({dtype, torch.float32}, (1, 16)):
        _sampling(torch.zeros(count, vocabulary, dtype=kind, device=device))
    for count in POWERS[:9]:
        tokens, ids, positions, slots = torch.zeros(4, count, dtype=torch.int64, device=device)
        lengths, tables, at = (torch.zeros(*s, dtype=torch.int32, device=device) for s in ((count,), (count, 1), (1,)))
        said = torch.zeros(1, count, dtype=torch.int64, device=device)
        ops.advance(tokens, ids, positions, lengths, slots, tables, PAGE, said, at)


def _over_pages(a: Attention, keys: Tensor, values: Tensor, sinks: Tensor | None) -> None:
    slopes = Slopes().of(a, keys.device)

    def attend(tokens: int, count: int, pages: int, kind: torch.dtype, step: bool) -> None:
        q = torch.empty(tokens, a.heads, a.head_dim, dtype=keys.dtype, device=keys.device)
        starts, lengths, tables = (
            torch.zeros(n, dtype=kind, device=keys.device) for n in (count + 1, count, count * pages)
        )
        at = None if step else starts
        ops.attend_pages(q, keys, values, tables.view(count, pages), at, lengths, a, slopes, sinks)

    for count, pages in product(POWERS[:9], (p for p in POWERS if p >= PAGES)):
        attend(count, count, pages, torch.int32, True)
    for count, each, pages in product(COUNTS, POWERS[:8], POWERS[:11]):
        if count * each > LONGEST:
            continue
        for kind in (torch.int32, torch.int64):  # recorded passes have narrow tables
            attend(count * each, count, pages, kind, False)


def _sampling(logits: Tensor) -> None:
    """Every way to choose that has kernels of its own; penalties have torch's."""
    ways = chain.from_iterable(combinations(FILTERS, n) for n in range(len(FILTERS) + 1))
    uniform = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    ops.sample(logits, ops.Choice(), None, None, None)
    for filters in ways:
        made = {n: torch.ones(len(logits), dtype=COLUMNS[n][1], device=logits.device) for n in filters}
        ops.sample(logits, ops.Choice(uniform.float(), **made), uniform, None, None)


def _encoder(model: Transformer) -> None:
    any_weight = next(w for w in model.weights.values() if w.is_floating_point() and w.dim() > 1)
    device, dtype, width = any_weight.device, any_weight.dtype, model.tower.width
    e = model.tower.embed
    for count in ROWS:
        positions = torch.zeros(1, count, dtype=torch.int64, device=device)
        x = torch.zeros(1, count, width, dtype=dtype, device=device)
        if isinstance(e, Tokens):
            x = model.embed(positions, positions, positions if e.types else None)
        model.finish(model.blocks(x, Rows(positions)))
    for a in {b.attention for b in model.tower.blocks}:
        for batch, tokens in product(COUNTS, (16, 17, 32, 33, 64, 65, 128, 129, 197, 256, 257, 384, 512)):
            if batch * tokens <= LONGEST:
                _beside(a, batch, tokens, dtype, device)


def _beside(a: Attention, batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    heads = a.heads + 2 * a.kv_heads
    y = torch.zeros(batch, tokens, heads, a.head_dim, dtype=dtype, device=device)
    q, k, v = y.split((a.heads, a.kv_heads, a.kv_heads), 2)
    seen = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=device)
    for mask in (None, seen):
        ops.attend(q, k, v, a, mask, None, None)
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device)
    ops.attend_packed(*(part.flatten(0, 1) for part in (q, k, v)), starts, a, None)
