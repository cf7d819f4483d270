"""Attention over pages: prompts, chunks of prompts and single new tokens, mixed in one launch.

The heads that share a kv head, for as many new tokens as fit, are the rows of one tile, so that a page is read once
for all of them. A sequence with one tile splits its keys over several programs; the last of them to finish puts their
answers together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.pages import attend_pages
from hasten.ops.triton.arrange import dense, interpreted, processors, served
from hasten.ops.triton.curves import tanh
from hasten.ops.triton.tiles import gather, sequence_of
from hasten.spec import Attention

LARGEST_TILE = 128 * 256  # rows times head_dim whose sums fit into registers: half as many where float32 is multiplied


@triton.jit
def shown(score, key, here, stop, slope, softcap, window):
    """Logarithms to base two of what the softmax weighs: capped, lowered by distance, minus infinity where unseen."""
    LOG2E: tl.constexpr = 1.4426950408889634
    distance = key[None, :] - here[:, None]
    if softcap is not None:
        score = softcap * tanh(score / softcap)
    if slope is not None:
        score += slope[:, None] * distance.to(tl.float32)
    seen = (distance <= 0) & (key < stop)[None, :]
    if window is not None:
        seen &= distance > -window
    return tl.where(seen, score * LOG2E, float("-inf"))


@triton.jit
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
    scale,
    softcap,
    window,
    tables_row,
    q_token,
    q_head,
    keys_page,
    keys_token,
    keys_head,
    values_page,
    values_token,
    values_head,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    DOT: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r = sequence_of(starts, tile, sequences, QUERIES)
    first = tl.load(starts + r).to(tl.int32)
    fresh = tl.load(starts + r + 1).to(tl.int32) - first
    earlier = (tile - (first + r * (QUERIES - 1)) // QUERIES) * QUERIES  # new tokens in this sequence's earlier tiles
    if earlier >= fresh:
        return
    length = tl.load(lengths + r).to(tl.int32)
    m = tl.arange(0, ROWS)
    i = tl.arange(0, DIM)
    token = earlier + m // GROUP
    head = kv_head * GROUP + m % GROUP
    here = length - fresh + token
    inside = ((m < QUERIES * GROUP) & (token < fresh))[:, None] & (i < HEAD_DIM)[None, :]
    query_at = (first + token).to(tl.int64) * q_token + head * q_head
    query = tl.load(q + query_at[:, None] + i[None, :], mask=inside, other=0.0).to(DOT)

    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32)

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

    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, DIM), tl.float32)
    for at in range(start, stop, KEYS):
        key = at + tl.arange(0, KEYS)
        page = tl.load(tables + r.to(tl.int64) * tables_row + key // PAGE, mask=key < stop, other=0).to(tl.int64)
        cached = (key < stop)[:, None] & (i < HEAD_DIM)[None, :]
        key_at = page * keys_page + (key % PAGE) * keys_token + kv_head * keys_head
        k = tl.load(keys + key_at[:, None] + i[None, :], mask=cached, other=0.0).to(DOT)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        score = shown(score, key, here, stop, slope, softcap, window)
        higher = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        share = tl.math.exp2(score - base[:, None])
        shrink = tl.math.exp2(peak - base)
        value_at = page * values_page + (key % PAGE) * values_token + kv_head * values_head
        v = tl.load(values + value_at[:, None] + i[None, :], mask=cached, other=0.0).to(DOT)
        y = y * shrink[:, None] + tl.dot(share.to(DOT), v, input_precision="ieee")
        total = total * shrink + tl.sum(share, 1)
        peak = higher

    finishes = splits == 1
    if SPLITS > 1:  # noqa: SIM102 - this one is decided when the kernel is compiled
        if splits > 1:
            cell = r.to(tl.int64) * tl.num_programs(1) + kv_head
            left = (cell * SPLITS + split) * ROWS + m
            tl.store(peaks + left, peak)
            tl.store(totals + left, total)
            tl.store(partial + left[:, None] * HEAD_DIM + i[None, :], y, mask=inside)
            tl.debug_barrier()  # every thread's stores come before the one thread's release below
            finishes = tl.atomic_add(arrived + cell, 1, sem="acq_rel") == splits - 1
            if finishes:
                peak, total, y = gather(partial, peaks, totals, cell * SPLITS, splits, m, i, inside, HEAD_DIM, AHEAD)
    if finishes:
        if sinks is not None:
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634  # log2(e)
            base = tl.maximum(peak, sink)
            y = y * tl.math.exp2(peak - base)[:, None]
            total = total * tl.math.exp2(peak - base) + tl.math.exp2(sink - base)
        y = y / tl.where(total > 0.0, total, 1.0)[:, None]
        out_at = ((first + token).to(tl.int64) * (tl.num_programs(1) * GROUP) + head) * HEAD_DIM
        tl.store(out + out_at[:, None] + i[None, :], y.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class AttendLaunch:
    queries: int  # new tokens of one sequence in a tile
    rows: int
    keys: int  # in one step of the loop
    dim: int
    splits: int  # at most
    ahead: int  # splits whose answers are read at once
    warps: int
    stages: int


def smallest_tile(a: Attention) -> tuple[int, int]:
    """(rows, head_dim) of the tile that one new token needs, in powers of two that matrix instructions take."""
    return max(triton.next_power_of_2(a.heads // a.kv_heads), 16), max(triton.next_power_of_2(a.head_dim), 16)


def attend_launch(
    tokens: int, sequences: int, capacity: int, a: Attention, wide: bool, processors: int
) -> AttendLaunch:
    """Tiles as high as the average sequence has rows, and splits until four programs wait for each processor.

    capacity: keys that a sequence's table has room for. wide: float32 operands, which the tensor cores do not take.
    """
    power, group = triton.next_power_of_2, a.heads // a.kv_heads
    least, dim = smallest_tile(a)
    most = 16 if wide else 64 if dim > 128 else 128
    rows = max(least, min(power(group * triton.cdiv(tokens, sequences)), most))
    if wide:
        keys, warps, stages = (32 if rows == 16 else 16), min(max(rows * dim // 256, 4), 16), 1
    else:
        keys, warps, stages = (32 if rows == 16 or dim > 128 else 64), (8 if rows > 64 or dim > 128 else 4), 3
    room = max((4 if rows == 16 else 2) * processors // (sequences * a.kv_heads), 1)
    splits = min(power(room + 1) // 2, power(triton.cdiv(capacity, keys)), 32)
    if sequences == 1 and tokens > rows // group:
        splits = 1  # several tiles, for certain
    return AttendLaunch(
        queries=rows // group,
        rows=rows,
        keys=keys,
        dim=dim,
        splits=splits,
        ahead=max(1, min(4, 2048 * warps // (rows * dim))),
        warps=warps,
        stages=stages,
    )


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
    dense_pools = keys.stride(-1) == values.stride(-1) == 1
    rows, dim = smallest_tile(a)
    largest = LARGEST_TILE // 2 if _operands(q, keys, values) == torch.float32 else LARGEST_TILE
    fits = rows <= 128 and dim <= 256 and rows * dim <= largest
    return dense_pools and fits and served(q, keys, values, slopes, sinks)


def _operands(q: Tensor, keys: Tensor, values: Tensor) -> torch.dtype:
    """What the matrix products take: the interpreter multiplies bfloat16 wrongly."""
    widest = torch.promote_types(q.dtype, torch.promote_types(keys.dtype, values.dtype))
    return torch.float32 if interpreted() and widest == torch.bfloat16 else widest


@attend_pages.register("triton", devices="cuda", accepts=_accepts)
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
    q, page = dense(q), keys.shape[1]
    if starts is None:
        starts = torch.arange(sequences + 1, device=q.device)
    dot = _operands(q, keys, values)
    wide, capacity = dot == torch.float32, tables.shape[1] * page
    shape = attend_launch(tokens, sequences, capacity, a, wide, processors(q.device))
    tiles = (tokens + sequences * (shape.queries - 1)) // shape.queries
    cells = sequences * a.kv_heads * shape.splits if shape.splits > 1 else 0
    partial, peaks, totals = (
        q.new_empty(cells * shape.rows * width, dtype=torch.float32) for width in (a.head_dim, 1, 1)
    )
    arrived = q.new_zeros(sequences * a.kv_heads if cells else 0, dtype=torch.int32)
    with torch.cuda.device_of(q):
        attend_tile[(tiles, a.kv_heads, shape.splits)](
            q,
            keys,
            values,
            dense(tables),
            starts.contiguous(),
            lengths.contiguous(),
            slopes,
            sinks,
            out,
            partial,
            peaks,
            totals,
            arrived,
            sequences,
            a.scale,
            a.softcap,
            a.window,
            tables.stride(0),
            *q.stride()[:2],
            *keys.stride()[:3],
            *values.stride()[:3],
            HEAD_DIM=a.head_dim,
            PAGE=page,
            GROUP=a.heads // a.kv_heads,
            QUERIES=shape.queries,
            ROWS=shape.rows,
            KEYS=shape.keys,
            DIM=shape.dim,
            SPLITS=shape.splits,
            AHEAD=shape.ahead,
            DOT=getattr(tl, str(dot).removeprefix("torch.")),
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return out
