"""The context of tokens of many sequences, end to end, over pages of keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hasten import ops
from hasten.model.context import KeysAndValues
from hasten.runtime.pools import Pools
from hasten.runtime.scheduler import Row
from hasten.runtime.transfer import upload
from hasten.spec import Alibi, Attention, Dynamic, LongRope, Rope

Turn = tuple[Tensor, Tensor]


class Turns:
    """cos and sin of positions from 0 on, of rotary embeddings that no length changes; kept from pass to pass."""

    def __init__(self) -> None:
        self._tables: dict[Rope, Tensor] = {}

    def at(self, r: Rope, positions: Tensor, highest: int) -> Turn:
        """Of these positions, none above `highest`."""
        cos, sin = self.table(r, highest + 1, positions.device).index_select(0, positions).chunk(2, -1)
        return cos, sin

    def table(self, r: Rope, count: int, device: torch.device) -> Tensor:
        """[cos | sin] of at least the first `count` positions, (positions, r.dim): one lookup gives both."""
        table = self._tables.get(r)
        if table is None or len(table) < count:
            positions = torch.arange(2 * max(count, 64), device=device)
            table = self._tables[r] = torch.cat(ops.rope_table(r, positions, 0), -1)
        return table

    def clear(self) -> None:
        self._tables.clear()


class Slopes:
    """The slopes of alibi on the device, kept from pass to pass."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Alibi, int, float], Tensor] = {}

    def of(self, a: Attention, device: torch.device) -> Tensor | None:
        """(heads,), what multiplies distances; None where the attention has no alibi."""
        if not isinstance(a.position, Alibi):
            return None
        tag = a.position, a.heads, a.scale
        if tag not in self._kept:
            slopes = ops.alibi_slopes(a.position, a.heads).to(device)
            self._kept[tag] = slopes * a.scale if a.position.scaled else slopes
        return self._kept[tag]


class Paged:
    """hasten.model.Context for one pass of `rows`, whose tokens lie end to end: hidden states are (tokens, width)."""

    def __init__(self, rows: Sequence[Row], positions: Tensor, pools: Pools, turns: Turns, slopes: Slopes) -> None:
        self.rows, self.positions, self.pools = rows, positions, pools
        self._turns, self._slopes = turns, slopes
        self._turned: dict[Rope, Turn] = {}
        self._place()

    def _place(self) -> None:
        """One transfer for everything integer: slots, starts, lengths and page tables."""
        size, slots, starts = self.pools.page_size, [], [0]
        most = max(-(-row.stop // size) for row in self.rows)
        tables: list[int] = []
        for row in self.rows:
            pages = row.sequence.pages
            slots += [pages[t // size] * size + t % size for t in range(row.start, row.stop)]
            starts.append(len(slots))
            held = pages[:most]
            tables += [*held, *[0] * (most - len(held))]
        lengths = [row.stop for row in self.rows]
        flat = upload(slots + starts + lengths + tables, torch.int64, self.positions.device)
        counts = [len(slots), len(starts), len(lengths), len(tables)]
        self.where, self.starts, self.lengths, tables_flat = flat.split(counts)
        self.tables = tables_flat.view(len(self.rows), most)  # (sequences, most pages)

    def turn(self, r: Rope) -> Turn:
        if r not in self._turned:
            if isinstance(r.scaling, Dynamic | LongRope):
                self._turned[r] = self._turn_by_length(r, r.scaling)
            else:
                self._turned[r] = self._turns.at(r, self.positions, max(row.stop for row in self.rows) - 1)
        return self._turned[r]

    def _turn_by_length(self, r: Rope, s: Dynamic | LongRope) -> Turn:
        parts = [
            ops.rope_table(r, torch.arange(first, last, device=self.positions.device), length)
            for row in self.rows
            for first, last, length in _lengths(row, s)
        ]
        return torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])

    def slots(self, i: int) -> ops.Slots:
        return ops.Slots(*self.pools.layers[i], self.where)

    def reach(self, a: Attention) -> ops.Reach | None:
        if isinstance(a.position, Alibi) and a.position.bf16:
            return None
        return ops.Reach(self.tables, self.starts, self.lengths, self._slopes.of(a, self.positions.device))

    def attend(
        self, i: int, a: Attention, q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        keys, values = self.pools.layers[i]
        r = self.reach(a)
        if r is None:
            assert isinstance(a.position, Alibi), "nothing else is rounded"
            return self._attend_rounded(keys, values, a, a.position, q, sinks)
        return ops.attend_pages(q, keys, values, r.tables, r.starts, r.lengths, a, r.slopes, sinks)

    def attend_memory(self, i: int, a: Attention, q: Tensor, make: KeysAndValues) -> Tensor:
        raise AssertionError("towers with cross attention are refused before they run")

    def _attend_rounded(
        self, keys: Tensor, values: Tensor, a: Attention, p: Alibi, q: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """Alibi rounded to bfloat16 depends on where a key lies, not on its distance: sequence by sequence, then."""
        slopes, out = ops.alibi_slopes(p, a.heads).to(q.device).bfloat16(), torch.empty_like(q)
        first = 0
        for r, row in enumerate(self.rows):
            last = first + row.stop - row.start
            pages = self.tables[r, : -(-row.stop // self.pools.page_size)]
            k, v = (pool[pages].flatten(0, 1)[None, : row.stop] for pool in (keys, values))
            here = torch.arange(row.stop, device=q.device)
            bias = (slopes[:, None] * here).float()[None, :, None, :]  # (1, heads, 1, keys)
            ago = here[row.start :, None] - here
            seen = ago >= 0 if a.window is None else (ago >= 0) & (ago < a.window)
            bias = bias * a.scale if p.scaled else bias
            out[first:last] = ops.attend(q[None, first:last], k, v, a, seen[None, None], bias, sinks)[0]
            first = last
        return out


def _lengths(row: Row, s: Dynamic | LongRope) -> Iterable[tuple[int, int, int]]:
    """(first, last, length): runs of the row's positions, and how long the sequence was when they first ran.

    Dynamic keeps what it cached when the base grows, so a restarted sequence turns each token as it was turned at
    first. LongRope has two states, and the scheduler restarts a sequence that changes from one to the other.
    """
    total, prompt = len(row.sequence.tokens), len(row.sequence.request.prompt)
    if isinstance(s, LongRope) or total <= s.original:
        return [(row.start, row.stop, total)]
    border = min(max(prompt, s.original, row.start), row.stop)
    runs = [(row.start, border, prompt)] if border > row.start else []
    return runs + [(at, at + 1, at + 1) for at in range(border, row.stop)]
