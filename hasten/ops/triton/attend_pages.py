"""Attention over pages: prompts, chunks of prompts and single new tokens, mixed in one launch.

The heads that share a kv head, for as many new tokens as fit, are the rows of one tile, so that a page is read once
for all of them. A sequence with one tile splits its keys over several programs; the last of them to finish puts their
answers together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.pages import attend_pages
from hasten.ops.table import is_invariant
from hasten.ops.triton.arrange import cdiv, dense, on, power_of_2, processors, served
from hasten.ops.triton.launch import dependent, go, wait
from hasten.ops.triton.tiles import absorb, answer, gather, leave, operands, places, sequence_of
from hasten.ops.workspace import counters
from hasten.spec import Attention

LARGEST_TILE = 128 * 256  # rows times head_dim whose sums fit into registers: half as many where float32 is multiplied


@triton.jit(do_not_specialize=("tables", "starts", "lengths", "sequences", "tables_row"))
def attend_tile(
    q,
    keys,
    values,
    tables,
    starts,
    lengths,
    slopes,
    sinks,
    out,
    partial,
    peaks,
    totals,
    arrived,
    sequences,
    kv_heads,
    scale,
    softcap,
    window,
    tables_row,
    q_token,
    q_head,
    page_row,
    token_row,
    head_row,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PART: tl.constexpr,
    AHEAD: tl.constexpr,
    BARE: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    back, split = (
        tl.num_programs(0) - 1 - tl.program_id(0),
        tl.program_id(1),
    )  # the longest tiles, a prompt's last, first
    tile, kv_head = back // kv_heads, back % kv_heads
    r = sequence_of(starts, tile, sequences, QUERIES)
    first = tl.load(starts + r).to(tl.int32)
    fresh = tl.load(starts + r + 1).to(tl.int32) - first
    earlier = (tile - (first + r * (QUERIES - 1)) // QUERIES) * QUERIES  # new tokens in this sequence's earlier tiles
    if earlier >= fresh:
        return
    length = tl.load(lengths + r).to(tl.int32)
    m, i = tl.arange(0, ROWS), tl.arange(0, DIM)
    here = length - fresh + earlier + m // GROUP
    token, tokens, head = first + earlier, tl.minimum(fresh - earlier, QUERIES), kv_head * GROUP
    width, slope = (i < HEAD_DIM)[None, :], None
    if slopes is not None:
        slope = tl.load(slopes + head + m % GROUP).to(tl.float32)

    # |---- before the window ----|---- blocks of KEYS, a run of them per split ----|---- behind the last query ----|
    last = tl.minimum(length - fresh + earlier + QUERIES, length)
    block = 0
    if window is not None:
        block = tl.maximum(length - fresh + earlier - window + 1, 0) // KEYS
    blocks = tl.maximum(tl.cdiv(last, KEYS) - block, 1)
    run = blocks
    if fresh <= QUERIES:
        run = tl.cdiv(blocks, SPLITS)
    splits = tl.cdiv(blocks, run)
    if split >= splits:
        return
    start = (block + split * run) * KEYS
    stop = tl.minimum(start + run * KEYS, last)

    wait(PDL)
    query_at = (token + m // GROUP).to(tl.int64) * q_token + (head + m % GROUP) * q_head
    query = tl.load(q + query_at[:, None] + i[None, :], mask=(m < tokens * GROUP)[:, None] & width, other=0.0).to(DOT)
    table, keys, values = tables + r.to(tl.int64) * tables_row, keys + kv_head * head_row, values + kv_head * head_row
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, DIM), tl.float32)
    whole = start
    if BARE:
        whole = tl.maximum(start, tl.minimum(stop, length - fresh + earlier + 1) // KEYS * KEYS)
        for at in range(start, whole, KEYS):
            key = at + tl.arange(0, KEYS)
            place = places(table, key, stop, page_row, token_row, PAGE, PDL) + i[None, :]
            k, v = tl.load(keys + place, mask=width, other=0.0), tl.load(values + place, mask=width, other=0.0)
            peak, total, y = absorb(
                query, k, v, key, here, stop, slope, scale, softcap, window, peak, total, y, DOT, WHOLE=True
            )
    for at in range(whole, stop, KEYS):
        key = at + tl.arange(0, KEYS)
        place = places(table, key, stop, page_row, token_row, PAGE, PDL) + i[None, :]
        cached = (key < stop)[:, None] & width
        k, v = tl.load(keys + place, mask=cached, other=0.0), tl.load(values + place, mask=cached, other=0.0)
        peak, total, y = absorb(
            query, k, v, key, here, stop, slope, scale, softcap, window, peak, total, y, DOT, WHOLE=False
        )

    if SPLITS == 1 or splits == 1:
        answer(out, sinks, m, i, token, tokens, head, kv_heads * GROUP, peak, total, y, GROUP, HEAD_DIM)
    else:
        cell = r.to(tl.int64) * kv_heads + kv_head
        leave(partial, peaks, totals, cell * SPLITS + split, m, i, ROWS, peak, total, y, HEAD_DIM)
        if tl.atomic_add(arrived + cell, 1, sem="acq_rel") == splits - 1:
            for some in range(0, ROWS, PART):
                g = some + tl.arange(0, PART)
                highest, sums, z = gather(partial, peaks, totals, cell * SPLITS, splits, g, i, ROWS, HEAD_DIM, AHEAD)
                answer(out, sinks, g, i, token, tokens, head, kv_heads * GROUP, highest, sums, z, GROUP, HEAD_DIM)
            tl.store(arrived + cell, 0)


@dataclass(frozen=True, slots=True)
class AttendLaunch:
    queries: int  # new tokens of one sequence in a tile
    rows: int
    keys: int  # in one step of the loop
    dim: int
    splits: int  # at most
    part: int  # rows that are put together at once
    ahead: int  # splits whose answers for them are read at once
    warps: int
    stages: int
    bare: bool  # blocks that every row sees go without masks


def smallest_tile(a: Attention) -> tuple[int, int]:
    """(rows, head_dim) of the tile that one new token needs, in powers of two that matrix instructions take."""
    return max(power_of_2(a.heads // a.kv_heads), 16), max(power_of_2(a.head_dim), 16)


@lru_cache(1024)
def attend_launch(
    tokens: int, sequences: int, capacity: int, a: Attention, wide: bool, processors: int
) -> AttendLaunch:
    """Tiles as high as the average sequence has rows, and splits until four programs wait for each processor.

    capacity: keys that a sequence's table has room for. wide: float32 operands, which the tensor cores do not take.
    """
    power, group = power_of_2, a.heads // a.kv_heads
    least, dim = smallest_tile(a)
    rows = max(least, min(power(group * cdiv(tokens, sequences)), 16 if wide else 64 if dim > 128 else 128))
    if wide:
        keys, warps, stages = (32 if rows == 16 else 16), min(max(rows * dim // 256, 4), 16), 1
    else:
        keys, warps, stages = (32 if rows == 16 or dim > 128 else 64), (8 if rows > 64 or dim > 128 else 4), 3
    room = max((4 if rows == 16 else 2) * processors // (sequences * a.kv_heads), 1)
    splits = min(power(room + 1) // 2, power(cdiv(capacity, keys)), 32)
    if sequences == 1 and tokens > rows // group:
        splits = 1  # several tiles, for certain
    numbers = (256 if wide else 512) * warps  # of a row of sums that are read at once
    part = min(rows, numbers // dim)
    return AttendLaunch(
        queries=rows // group,
        rows=rows,
        keys=keys,
        dim=dim,
        splits=splits,
        part=part,
        ahead=1 if wide else min(4, 2 * numbers // (part * dim)),
        warps=warps,
        stages=stages,
        bare=not wide and a.window is None and rows > 16,
    )


@lru_cache(1024)
def fixed_launch(a: Attention, wide: bool, processors: int) -> AttendLaunch:
    """Tiles of at least 64 rows for prompts, their pieces and single tokens alike, and one program for all keys.

    So a query meets the same blocks of keys, which begin at multiples of KEYS, in the same order and by the same
    instructions, whatever else is in its tile: a block that it does not see leaves its sums as they are.
    """
    group = a.heads // a.kv_heads
    return replace(attend_launch(cdiv(64, group), 1, 1, a, wide, processors), splits=1, bare=False)


def _accepts(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor | None,
    lengths: Tensor,
    a: Attention,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> bool:
    rows, dim = smallest_tile(a)
    largest = LARGEST_TILE // 2 if operands(q, keys, values) == torch.float32 else LARGEST_TILE
    alike = keys.stride() == values.stride() and keys.stride(-1) == 1
    mine = starts is not None or is_invariant()  # other steps are attend_step.py's
    fits = rows <= 128 and dim <= 256 and rows * dim <= largest
    return alike and mine and fits and served(q, keys, values, slopes, sinks)


@attend_pages.register("triton", devices="cuda", accepts=_accepts, invariant=True)
def _(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor | None,
    lengths: Tensor,
    a: Attention,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    tokens, sequences, out = len(q), len(lengths), q.new_empty(q.shape)
    if not out.numel():
        return out
    if starts is None:
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=q.device)
    q, tables, page, dot = dense(q), dense(tables), keys.shape[1], operands(q, keys, values)
    wide, count = dot == torch.float32, processors(q.device)
    if is_invariant():
        shape = fixed_launch(a, wide, count)
    else:
        shape = attend_launch(tokens, sequences, tables.shape[1] * page, a, wide, count)
    tiles = (tokens + sequences * (shape.queries - 1)) // shape.queries
    cells = sequences * a.kv_heads * shape.splits if shape.splits > 1 else 0
    partial, peaks, totals = (
        q.new_empty(cells * shape.rows * width, dtype=torch.float32) for width in (a.head_dim, 1, 1)
    )
    with on(q):
        attend_tile[(tiles * a.kv_heads, shape.splits)](
            q,
            keys,
            values,
            tables,
            starts.contiguous(),
            lengths.contiguous(),
            slopes,
            sinks,
            out,
            partial,
            peaks,
            totals,
            counters(sequences * a.kv_heads, q.device) if cells else totals,
            sequences,
            a.kv_heads,
            a.scale,
            a.softcap,
            a.window,
            tables.stride(0),
            *q.stride()[:2],
            *keys.stride()[:3],
            HEAD_DIM=a.head_dim,
            PAGE=page,
            GROUP=a.heads // a.kv_heads,
            QUERIES=shape.queries,
            ROWS=shape.rows,
            KEYS=shape.keys,
            DIM=shape.dim,
            SPLITS=shape.splits,
            PART=shape.part,
            AHEAD=shape.ahead,
            BARE=shape.bare,
            DOT=getattr(tl, str(dot).removeprefix("torch.")),
            num_warps=shape.warps,
            num_stages=shape.stages,
            **dependent(q.device),
        )
    return out
