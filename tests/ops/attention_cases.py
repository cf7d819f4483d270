"""Arguments for attention, over keys side by side and over pages, and for writing those."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tests.ops.arguments import Maker, attention, random


def attend_case(
    sizes: tuple[int, int, int],  # batch, queries, keys
    heads: tuple[int, int, int],  # heads, kv_heads, head_dim
    d: torch.dtype,
    mask: str = "",
    bias: tuple[int, ...] | None = None,
    sinks: bool = False,
    gap: bool = False,
    **more: Any,
) -> tuple[Any, ...]:
    (batch, queries, keys), (h, kv, dim) = sizes, heads
    q = random(batch, queries, h, dim, dtype=d)
    k, v = (random(batch, keys, kv, dim, dtype=d) for _ in range(2))
    if gap:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    padded = torch.arange(keys) >= torch.arange(batch).view(-1, 1, 1, 1)  # sequence b starts with b hidden keys
    masks = {"": None, "causal": causal, "padded": padded, "both": causal & padded, "nothing": causal & False}
    shown = None if bias is None else random(*bias, dtype=d)
    return q, k, v, attention(h, kv, dim, **more), masks[mask], shown, random(h, dtype=d) if sinks else None


ATTENDS: dict[str, Maker] = {
    "everything visible": partial(attend_case, (2, 5, 7), (3, 3, 10)),
    "causal": partial(attend_case, (1, 7, 7), (2, 2, 16), mask="causal"),
    "causal behind a cache": partial(attend_case, (2, 3, 8), (4, 2, 8), mask="causal"),
    "left-padded, some rows see nothing": partial(attend_case, (3, 5, 5), (6, 2, 8), mask="both"),
    "nothing visible": partial(attend_case, (1, 2, 3), (2, 1, 8), mask="nothing"),
    "one query": partial(attend_case, (1, 1, 9), (4, 4, 12)),
    "one query, grouped": partial(attend_case, (2, 1, 9), (6, 2, 8), mask="padded"),
    "one query, grouped, bias per head": partial(attend_case, (2, 1, 9), (6, 2, 8), mask="padded", bias=(6, 1, 9)),
    "one key": partial(attend_case, (1, 1, 1), (2, 2, 8), mask="causal"),
    "no queries": partial(attend_case, (1, 0, 4), (2, 2, 8)),
    "no keys": partial(attend_case, (1, 2, 0), (2, 2, 8)),
    "bias": partial(attend_case, (2, 4, 6), (3, 1, 8), bias=(1, 3, 4, 6)),
    "bias and mask": partial(attend_case, (2, 4, 6), (4, 2, 8), mask="both", bias=(4, 4, 6)),
    "soft-cap": partial(attend_case, (2, 4, 6), (4, 2, 8), mask="both", softcap=2.0),
    "soft-cap and bias": partial(attend_case, (1, 4, 6), (2, 2, 8), bias=(4, 6), softcap=2.0),
    "sinks": partial(attend_case, (2, 4, 6), (4, 2, 8), mask="both", sinks=True),
    "strided": partial(attend_case, (2, 5, 7), (4, 2, 8), mask="padded", gap=True),
}


def pages_case(
    lengths: tuple[int, ...],
    new: tuple[int, ...],
    heads: tuple[int, int, int],
    d: torch.dtype,
    size: int = 4,
    neighbours: bool = False,
    slopes: bool = False,
    sinks: bool = False,
    steps: bool = False,
    **more: Any,
) -> tuple[Any, ...]:
    """steps: the caller says that every sequence has one new token."""
    h, kv, dim = heads
    most = max(-(-n // size) for n in lengths)
    count = most * len(lengths) + 2
    order = torch.arange(count) if neighbours else torch.randperm(count)
    tables = order[: most * len(lengths)].view(len(lengths), most).int()
    keys, values = (random(count, size, kv, dim, dtype=d) for _ in range(2))
    starts = torch.tensor((0, *new)).cumsum(0).int()
    slope = torch.linspace(0.05, 0.4, h).to(d) if slopes else None
    q = random(sum(new), h, dim, dtype=d)
    a, sink = attention(h, kv, dim, **more), random(h, dtype=d) if sinks else None
    return q, keys, values, tables, None if steps else starts, torch.tensor(lengths).int(), a, slope, sink


PAGES: dict[str, Maker] = {
    "prompts": partial(pages_case, (5, 8, 1), (5, 8, 1), (4, 2, 8)),
    "prompts, neighbours": partial(pages_case, (5, 8, 1), (5, 8, 1), (4, 2, 8), neighbours=True),
    "one token each": partial(pages_case, (9, 1, 4, 13), (1, 1, 1, 1), (4, 4, 8)),
    "one token each, neighbours": partial(pages_case, (9, 1, 4, 13), (1, 1, 1, 1), (6, 2, 16), neighbours=True),
    "prompt, chunk and token": partial(pages_case, (6, 11, 7), (6, 3, 1), (3, 1, 10)),
    "a sequence without new tokens": partial(pages_case, (6, 5, 7), (2, 0, 1), (2, 2, 8)),
    "window": partial(pages_case, (11, 3, 16), (4, 3, 1), (4, 2, 8), window=5),
    "window, neighbours": partial(pages_case, (11, 3, 16), (4, 3, 1), (4, 2, 8), window=5, neighbours=True),
    "alibi": partial(pages_case, (6, 11, 7), (6, 3, 1), (3, 3, 8), slopes=True),
    "soft-cap": partial(pages_case, (6, 11, 7), (6, 3, 1), (4, 2, 8), softcap=2.0),
    "sinks and window": partial(pages_case, (6, 11, 7), (6, 3, 1), (4, 2, 8), sinks=True, window=4),
    "steps": partial(pages_case, (9, 1, 4, 13), (1, 1, 1, 1), (4, 2, 8), steps=True),
    "steps with an empty place": partial(pages_case, (9, 0, 4), (1, 1, 1), (3, 1, 10), steps=True, window=5),
    "steps, sinks and soft-cap": partial(pages_case, (6, 7), (1, 1), (4, 2, 8), steps=True, sinks=True, softcap=2.0),
    "pages of one token": partial(pages_case, (3, 2), (1, 2), (2, 1, 8), size=1),
}


def write_case(slots: tuple[int, ...], d: torch.dtype) -> tuple[Any, ...]:
    k, v = (random(len(slots), 3, 10, dtype=d) for _ in range(2))
    keys, values = (random(5, 4, 3, 10, dtype=d) for _ in range(2))
    return k, v, keys, values, torch.tensor(slots, dtype=torch.int64)


WRITES: dict[str, Maker] = {
    "a run": partial(write_case, (6, 7, 8, 9, 10)),
    "one token": partial(write_case, (19,)),
    "scattered": partial(write_case, (3, 17, 4, 0)),
    "some skipped": partial(write_case, (-1, 5, -1, 6)),
    "a run behind a skipped one": partial(write_case, (-1, 0, 1)),
    "all skipped": partial(write_case, (-1, -1)),
    "nothing": partial(write_case, ()),
}


def packed_case(
    lengths: tuple[int, ...],
    heads: tuple[int, int, int],
    d: torch.dtype,
    causal: bool = False,
    sinks: bool = False,
    gap: bool = False,
    **more: Any,
) -> tuple[Any, ...]:
    """gap: q, k and v are slices of one tensor, as a product leaves them."""
    h, kv, dim = heads
    made = random(sum(lengths), h + 2 * kv, dim, dtype=d)
    q, k, v = made.split((h, kv, kv), 1)
    if not gap:
        q, k, v = (t.contiguous() for t in (q, k, v))
    starts = torch.tensor((0, *lengths)).cumsum(0).int()
    a = replace(attention(h, kv, dim, **more), causal=causal)
    return q, k, v, starts, a, random(h, dtype=d) if sinks else None


PACKED: dict[str, Maker] = {
    "sequences": partial(packed_case, (5, 1, 9), (4, 4, 8)),
    "one sequence, strided": partial(packed_case, (7,), (3, 3, 10), gap=True),
    "an empty one": partial(packed_case, (4, 0, 3), (2, 1, 16)),
    "causal": partial(packed_case, (6, 4), (4, 2, 8), causal=True, gap=True),
    "causal, window": partial(packed_case, (6, 9), (4, 2, 8), causal=True, window=3),
    "soft-cap": partial(packed_case, (6, 3), (2, 2, 8), softcap=2.0),
    "sinks": partial(packed_case, (6, 3), (4, 2, 8), sinks=True),
    "longer than a tile": partial(packed_case, (70, 3, 21), (2, 1, 24)),
    "nothing": partial(packed_case, (0,), (2, 2, 8)),
}
