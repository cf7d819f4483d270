"""A context whose tensors never move, so that launches which read them can be recorded once and repeated."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from hasten import ops
from hasten.model import Transformer
from hasten.model.context import KeysAndValues
from hasten.runtime.paged import Slopes, Turn, Turns
from hasten.runtime.pools import Pools
from hasten.runtime.sampler import COLUMNS, FILTERS, Columns, draw
from hasten.runtime.scheduler import Row
from hasten.runtime.transfer import bytes_of, host
from hasten.spec import Attention, Rope

ALIGNED = 256
"""Bytes that every tensor begins at a multiple of, as memory of its own would."""

CODES = {torch.int32: "i", torch.int64: "q", torch.float32: "f", torch.float64: "d"}
"""How Python's arrays call the dtypes."""

Fields = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape of each tensor in a block."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What one generator's contexts share."""

    pools: Pools
    turns: Turns
    slopes: Slopes


class Fixed:
    """hasten.model.Context of up to `places` sequences of up to `pages` pages, each with one new token or, with
    `starts`, a run of them, end to end.

    All that the host decides lies in one block of memory, which one copy fills. A place without a sequence has length
    0, a token that belongs to none has slot -1: they compute something, and nobody sees it. Subclasses add fields.
    """

    def __init__(self, tokens: int, places: int, pages: int, kept: Kept, more: Fields) -> None:
        self.places, self.pages, self.kept = places, pages, kept
        self.device = kept.pools.layers[0][0].device
        self._fields = {**_fields(tokens, places, pages), **more}
        self._begins, size = _begins(self._fields)
        self._block = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self.at = {name: self._carve(name) for name in self._fields}
        at, slots = self._begins["slots"], self.at["slots"].nbytes
        self._empty = bytes(at) + b"\xff" * slots + bytes(size - at - slots)
        self.positions = self.at["positions"]
        self.entering: Tensor | None = None  # (tokens, width): where a stage that has no embedding begins
        self._tables: dict[Rope, Tensor] = {}
        self._turned: dict[Rope, Turn] = {}

    def page_tables(self, rows: Sequence[Row]) -> array[int]:
        """The rows' pages, each filled up to `pages`."""
        table = array("i", bytes(4 * len(rows) * self.pages))
        for i, row in enumerate(rows):
            held = row.sequence.pages[: self.pages]
            table[i * self.pages : i * self.pages + len(held)] = held
        return table

    def fill(self, values: dict[str, Sequence[float]]) -> None:
        """Copy the first elements of fields to the device; all others become 0, -1 in slots."""
        block = host([len(self._block)], torch.uint8, self.device)
        there = bytes_of(block)
        there[:] = self._empty
        for name, given in values.items():
            if given:
                dtype, _ = self._fields[name]
                made = memoryview(given if isinstance(given, array) else array(CODES[dtype], given)).cast("B")
                at = self._begins[name]
                there[at : at + len(made)] = made
        self._block.copy_(block, non_blocking=True)

    def _carve(self, name: str) -> Tensor:
        (dtype, shape), at = self._fields[name], self._begins[name]
        return self._block[at : at + prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def run(self, model: Transformer, rows: Tensor | None = None) -> Tensor:
        """Hidden states behind the last block that is here, (tokens, width), or of some rows alone."""
        for r in dict.fromkeys(b.attention.position for b in model.tower.blocks):
            if isinstance(r, Rope):
                self._turned[r] = self._turn(r)
        x = model.embed(self.at["ids"], self.positions) if self.entering is None else self.entering
        return model.through(x, self, rows=rows)

    def _turn(self, r: Rope) -> Turn:
        if r not in self._tables:
            count = self.pages * self.kept.pools.page_size
            self._tables[r] = self.kept.turns.table(r, count, self.device)
        cos, sin = self._tables[r].index_select(0, self.positions).chunk(2, -1)
        return cos, sin

    def turn(self, r: Rope) -> Turn:
        return self._turned[r]

    def slots(self, i: int) -> ops.Slots:
        return ops.Slots(*self.kept.pools.layers[i], self.at["slots"])

    def reach(self, a: Attention) -> ops.Reach:
        at, slopes = self.at, self.kept.slopes.of(a, self.device)
        return ops.Reach(at["tables"], at.get("starts"), at["lengths"], slopes)

    def attend(
        self, i: int, a: Attention, q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        r, (keys, values) = self.reach(a), self.kept.pools.layers[i]
        return ops.attend_pages(q, keys, values, r.tables, r.starts, r.lengths, a, r.slopes, sinks)

    def attend_memory(self, i: int, a: Attention, q: Tensor, make: KeysAndValues) -> Tensor:
        raise AssertionError("towers with cross attention are refused before they run")

    def choice(self, columns: Columns) -> ops.Choice:
        return ops.Choice(**{name: self.at[name] for name in columns})


def choosing(rows: Sequence[Row], steps: int, places: int, columns: Columns) -> dict[str, Sequence[float]]:
    """How each row chooses in so many steps: its parameters, and for each step a number, as fields."""
    if not columns:
        return {}
    lines = [row.sequence for row in rows]
    found: dict[str, Sequence[float]] = {}
    for name in columns:
        read, _ = COLUMNS[name]
        found[name] = [read(line.request.sampling) for line in lines]
    empty = [0.0] * (places - len(lines))
    found["uniform"] = [u for step in range(steps) for u in [*(draw(line, step) for line in lines), *empty]]
    return found


def _fields(tokens: int, places: int, pages: int) -> Fields:
    return {
        "ids": (torch.int64, (tokens,)),
        "positions": (torch.int64, (tokens,)),
        "slots": (torch.int64, (tokens,)),
        "lengths": (torch.int32, (places,)),
        "tables": (torch.int32, (places, pages)),
        **{name: (COLUMNS[name][1], (places,)) for name in ("temperature", *FILTERS)},
    }


def _begins(fields: Fields) -> tuple[dict[str, int], int]:
    """Where each field begins, one behind the other in a block of bytes, and the size of the block."""
    begins, at = {}, 0
    for name, (dtype, shape) in fields.items():
        begins[name] = at
        at += -(-prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
    return begins, at
