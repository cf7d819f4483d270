"""Attention of a decode step: the newest token of every sequence over its pages, at the speed of memory.

One program takes one kv head of one sequence for a run of its keys. The heads that share the kv head are the rows of a
tile, so that keys and values are read once for all of them; the block after the one in use is on its way into
registers. All but the newest key and value were written in earlier steps, so a program reads its first block of them
before the kernel before it, which makes q and the newest ones, has ended. The last program of a sequence's head to
finish puts the answers of all together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.pages import attend_pages
from hasten.ops.triton.arrange import cdiv, dense, on, power_of_2, processors, served
from hasten.ops.triton.curves import tanh
from hasten.ops.triton.launch import dependent, go, wait
from hasten.ops.triton.step_launch import step_launch
from hasten.ops.triton.tiles import answer, gather, leave, operands, places
from hasten.ops.workspace import counters
from hasten.spec import Attention

LINE = 128  # bytes that one fetch brings


@triton.jit
def fetch(at):
    """Start to bring the lines of memory at these pointers into the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def weight(score, distance, slope, scale, softcap):
    """Logarithm to base two of what the softmax weighs: scaled, capped, lowered by distance."""
    score *= scale
    if softcap is not None:
        score = softcap * tanh(score / softcap)
    if slope is not None:
        score += slope * distance.to(tl.float32)
    return score * 1.4426950408889634  # log2(e)


@triton.jit
def take(query, k, v, key, stop, newest, slope, scale, softcap, peak, total, y, DOT: tl.constexpr):
    """(peak, total, y) of a softmax that has seen this block too. One row needs no matrix instruction."""
    seen, distance = key < stop, key - newest
    if query.shape[0] == 1:
        score = tl.sum(query * k.to(tl.float32), 1)
        score = tl.where(seen, weight(score, distance, slope, scale, softcap), float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.math.exp2(score - base)
        added, shares = tl.sum(share[:, None] * v.to(tl.float32), 0)[None, :], tl.sum(share, 0)
    else:
        score = tl.dot(query, tl.trans(k.to(DOT)), input_precision="ieee")
        tilt = slope if slope is None else slope[:, None]
        score = tl.where(seen[None, :], weight(score, distance[None, :], tilt, scale, softcap), float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.math.exp2(score - base[:, None])
        added, shares = tl.dot(share.to(DOT), v.to(DOT), input_precision="ieee"), tl.sum(share, 1)
    shrink = tl.math.exp2(peak - base)
    return higher, total * shrink + shares, y * shrink[:, None] + added


@triton.jit(do_not_specialize=("tables", "lengths", "tables_row"))
def attend_token(
    q,
    keys,
    values,
    tables,
    lengths,
    slopes,
    sinks,
    out,
    partial,
    peaks,
    totals,
    arrived,
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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    HEADS: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    FETCH: tl.constexpr,
    LINES: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    kv_head, r, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(lengths + r).to(tl.int32)

    # |---- before the window ----|---- runs of whole blocks, one per split ----| newest |
    begin = 0
    if window is not None:
        begin = tl.maximum(length - window, 0)
    run = tl.maximum(tl.cdiv(tl.cdiv(length - begin, SPLITS), KEYS) * KEYS, LEAST)
    splits = tl.maximum(tl.cdiv(length - begin, run), 1)
    if split >= splits:
        return
    start = begin + split * run
    stop = tl.minimum(start + run, length)

    m, i = tl.arange(0, ROWS), tl.arange(0, DIM)
    width, mine = (i < HEAD_DIM)[None, :], m < GROUP
    keys, values = keys + kv_head * head_row, values + kv_head * head_row
    table, head, newest = tables + r * tables_row, kv_head * GROUP + m % GROUP, length - 1
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32)
    key = start + tl.arange(0, KEYS)
    place = places(table, key, stop, page_row, token_row, PAGE, PDL) + i[None, :]
    old = (key < tl.minimum(stop, newest))[:, None] & width
    k, v = tl.load(keys + place, mask=old, other=0.0), tl.load(values + place, mask=old, other=0.0)
    if PDL and FETCH:  # noqa: SIM102 - this one is decided when the kernel is compiled
        if start + KEYS < stop:
            later = tl.minimum(start + KEYS + tl.arange(0, FETCH), stop - 1)
            line = places(table, later, stop, page_row, token_row, PAGE, PDL)
            line += tl.arange(0, LINES)[None, :] * (HEAD_DIM // LINES)
            fetch(keys + line)
            fetch(values + line)

    wait(PDL)
    new = (key == newest)[:, None] & (key < stop)[:, None] & width
    k = tl.load(keys + place, mask=new, other=k, cache_modifier=".cg")
    v = tl.load(values + place, mask=new, other=v, cache_modifier=".cg")
    query_at = q + (r * q_token + head * q_head)[:, None] + i[None, :]
    query = tl.load(query_at, mask=mine[:, None] & width, other=0.0).to(tl.float32 if ROWS == 1 else DOT)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, DIM), tl.float32)
    peak, total, y = take(query, k, v, key, stop, newest, slope, scale, softcap, peak, total, y, DOT)
    for at in tl.range(start + KEYS, stop, KEYS, num_stages=STAGES):
        key = at + tl.arange(0, KEYS)
        place = places(table, key, stop, page_row, token_row, PAGE, PDL) + i[None, :]
        cached = (key < stop)[:, None] & width
        k, v = tl.load(keys + place, mask=cached, other=0.0), tl.load(values + place, mask=cached, other=0.0)
        peak, total, y = take(query, k, v, key, stop, newest, slope, scale, softcap, peak, total, y, DOT)

    heads = tl.num_programs(0) * GROUP
    if splits == 1:
        answer(out, sinks, m, i, r, 1, kv_head * GROUP, heads, peak, total, y, GROUP, HEAD_DIM)
        return
    cell = r * tl.num_programs(0) + kv_head
    leave(partial, peaks, totals, cell * SPLITS + split, m, i, GROUP, peak, total, y, HEAD_DIM)
    if tl.atomic_add(arrived + cell, 1, sem="acq_rel") == splits - 1:
        for some in range(0, GROUP, HEADS):
            g = some + tl.arange(0, HEADS)
            highest, sums, z = gather(partial, peaks, totals, cell * SPLITS, splits, g, i, GROUP, HEAD_DIM, AHEAD)
            answer(out, sinks, g, i, r, 1, kv_head * GROUP, heads, highest, sums, z, GROUP, HEAD_DIM)
        tl.store(arrived + cell, 0)


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
    if starts is not None or a.heads // a.kv_heads > 128 or a.head_dim > 256:
        return False
    return keys.stride() == values.stride() and keys.stride(-1) == 1 and served(q, keys, values, slopes, sinks)


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
    sequences, out = len(lengths), q.new_empty(q.shape)
    if not out.numel() or not tables.numel():
        return out.zero_()
    q, tables, page, group = dense(q), dense(tables), keys.shape[1], a.heads // a.kv_heads
    dot = operands(q, keys, values)
    size = max(keys.element_size(), dot.itemsize)
    shape = step_launch(sequences, tables.shape[1] * page, a, size, processors(q.device))
    cells = sequences * a.kv_heads * shape.splits * group if shape.splits > 1 else 0
    partial, peaks, totals = (q.new_empty(cells * width, dtype=torch.float32) for width in (a.head_dim, 1, 1))
    with on(q):
        attend_token[(a.kv_heads, sequences, shape.splits)](
            q,
            keys,
            values,
            tables,
            lengths.contiguous(),
            slopes,
            sinks,
            out,
            partial,
            peaks,
            totals,
            counters(sequences * a.kv_heads, q.device) if cells else totals,
            a.scale,
            a.softcap,
            a.window,
            tables.stride(0),
            *q.stride()[:2],
            *keys.stride()[:3],
            HEAD_DIM=a.head_dim,
            PAGE=page,
            GROUP=group,
            ROWS=shape.rows,
            KEYS=shape.keys,
            DIM=shape.dim,
            SPLITS=shape.splits,
            LEAST=shape.least,
            HEADS=shape.heads,
            AHEAD=shape.ahead,
            STAGES=shape.stages,
            FETCH=shape.fetch,
            LINES=power_of_2(cdiv(a.head_dim * keys.element_size(), LINE)),
            DOT=getattr(tl, str(dot).removeprefix("torch.")),
            num_warps=shape.warps,
            **dependent(q.device),
        )
    return out
