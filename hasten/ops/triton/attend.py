"""Attention over keys that lie side by side: rectangular batches, and sequences end to end.

A program owns a tile of one head's queries and walks over that sequence's keys. It takes what torch's fused kernels
lack: biases in float32, soft-caps, sinks, masks as they are, sequences of unequal length; and it starts while the
product before it still runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.attention import attend
from hasten.ops.packed import attend_packed
from hasten.ops.triton.arrange import cdiv, dense, interpreted, on, power_of_2, processors, served
from hasten.ops.triton.curves import tanh
from hasten.ops.triton.launch import dependent, go, wait
from hasten.ops.triton.tiles import sequence_of
from hasten.spec import Attention

FEWEST = 16  # queries that fill the smallest tile
SHORT = 512  # keys up to which the gap between kernels counts, which torch's do not close
MUCH = 2**25  # scores from which it does not

COUNTS = ("starts", "sequences", "queries")  # what differs from call to call, and makes no variant
PLACES = ("keys", "mask", "mask_batch", "mask_head", "mask_query", "bias", "bias_batch", "bias_head", "bias_query")


@triton.jit(do_not_specialize=(*COUNTS, *PLACES))
def attend_rows(
    q,
    k,
    v,
    starts,
    mask,
    bias,
    sinks,
    out,
    sequences,
    queries,
    keys,
    scale,
    softcap,
    window,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    bias_batch,
    bias_head,
    bias_query,
    bias_key,
    CAUSAL: tl.constexpr,
    PADDING: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """PADDING: every query has the same row of the mask, which is read once a tile of keys."""
    go(PDL)
    wait(PDL)
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    if starts is not None:
        r = sequence_of(starts, tile, sequences, ROWS)
        first = tl.load(starts + r).to(tl.int32)
        queries = tl.load(starts + r + 1).to(tl.int32) - first
        keys = queries
        at = (tile - (first + r * (ROWS - 1)) // ROWS) * ROWS
        q_at, k_at, v_at, out_at = first.to(tl.int64), first.to(tl.int64), first.to(tl.int64), first.to(tl.int64)
        q_at, k_at, v_at = q_at * q_token, k_at * k_token, v_at * v_token
    else:
        tiles = tl.cdiv(queries, ROWS)
        r = tile // tiles
        at = tile % tiles * ROWS
        wide = r.to(tl.int64)
        q_at, k_at, v_at, out_at = wide * q_batch, wide * k_batch, wide * v_batch, wide * queries
    if at >= queries:
        return
    here = at + tl.arange(0, ROWS)
    i = tl.arange(0, DIM)
    inside = (here < queries)[:, None] & (i < HEAD_DIM)[None, :]
    query_at = q_at + head * q_head + here.to(tl.int64)[:, None] * q_token + i[None, :]
    query = tl.load(q + query_at, mask=inside, other=0.0).to(DOT)
    k_at += (head // GROUP) * k_head
    v_at += (head // GROUP) * v_head

    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, DIM), tl.float32)
    begin, stop = 0, keys
    if CAUSAL:
        stop = tl.minimum(keys, at + ROWS)
        if window is not None:
            begin = tl.maximum(at - window + 1, 0) // KEYS * KEYS
    for start in range(begin, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        there = (key < stop)[:, None] & (i < HEAD_DIM)[None, :]
        key_at = key.to(tl.int64)[:, None]
        kt = tl.load(k + k_at + key_at * k_token + i[None, :], mask=there, other=0.0).to(DOT)
        score, factor = tl.dot(query, tl.trans(kt), input_precision="ieee"), scale
        if softcap is not None:
            score, factor = softcap * tanh(score * (scale / softcap)), 1.0
        shown = key < stop
        if PADDING:
            row = mask + r.to(tl.int64) * mask_batch + head * mask_head
            shown &= tl.load(row + key * mask_key, mask=shown, other=0) != 0
        # what is hidden from every query costs one fused addition, and no choice for each score
        score = score * (factor * LOG2E) + tl.where(shown, 0.0, float("-inf"))[None, :]
        within = (here < queries)[:, None] & (key < stop)[None, :]
        if bias is not None:
            where = r.to(tl.int64) * bias_batch + head * bias_head
            where += here.to(tl.int64)[:, None] * bias_query + key[None, :] * bias_key
            score += tl.load(bias + where, mask=within, other=0.0).to(tl.float32) * LOG2E
        if mask is not None and not PADDING:
            where = r.to(tl.int64) * mask_batch + head * mask_head
            where += here.to(tl.int64)[:, None] * mask_query + key[None, :] * mask_key
            score = tl.where(tl.load(mask + where, mask=within, other=0) != 0, score, float("-inf"))
        if CAUSAL:
            seen = key[None, :] <= here[:, None]
            if window is not None:
                seen &= key[None, :] > here[:, None] - window
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        share = tl.math.exp2(score - base[:, None])
        shrink = tl.math.exp2(peak - base)
        vt = tl.load(v + v_at + key_at * v_token + i[None, :], mask=there, other=0.0).to(DOT)
        y = y * shrink[:, None] + tl.dot(share.to(DOT), vt, input_precision="ieee")
        total = total * shrink + tl.sum(share, 1)
        peak = higher

    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        base = tl.maximum(peak, sink)
        y = y * tl.math.exp2(peak - base)[:, None]
        total = total * tl.math.exp2(peak - base) + tl.math.exp2(sink - base)
    y *= (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]  # a query that sees nothing gets zeros
    into = ((out_at + here) * heads + head)[:, None] * HEAD_DIM + i[None, :]
    tl.store(out + into, y.to(out.dtype.element_ty), mask=inside)


attend_even = triton.jit(attend_rows.fn, do_not_specialize=COUNTS)
"""The same for masks and biases whose rows begin, and end, where sixteen numbers are read at once."""


@dataclass(frozen=True, slots=True)
class RowsLaunch:
    rows: int  # queries of a tile
    keys: int  # in one step of the loop
    dim: int
    warps: int
    stages: int


@lru_cache(1024)
def rows_launch(queries: int, tokens: int, heads: int, head_dim: int, wide: bool, processors: int) -> RowsLaunch:
    """Tiles as high as a sequence, up to 128; of 64 where that leaves processors idle, and short keys then in one step.

    queries: of one sequence, or on average. tokens: of all sequences. wide: float32 operands.
    """
    dim = max(power_of_2(head_dim), 16)
    most = 16 if wide or dim > 256 else 64 if dim > 128 else 128
    rows = min(max(power_of_2(queries), FEWEST), most)
    if rows == 128 and cdiv(tokens, rows) * heads < processors * 3 // 4:
        rows = 64
    warps = 8 if rows == 128 or dim > 128 else 4
    if wide or dim > 128:
        return RowsLaunch(rows=rows, keys=32, dim=dim, warps=warps, stages=1 if wide else 2)
    once = rows < 128 and dim <= 64 and queries <= 128
    return RowsLaunch(rows=rows, keys=128 if once else 64, dim=dim, warps=warps, stages=2 if once else 3)


def _serves(q: Tensor, k: Tensor, v: Tensor, a: Attention, *more: Tensor | None) -> bool:
    """Whether heads fit into registers and lie in one piece; float32 is multiplied slowly, so torch has it."""
    narrow = interpreted() or q.dtype in (torch.float16, torch.bfloat16)
    whole = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    return narrow and whole and a.head_dim <= 256 and q.numel() > 0 and served(q, k, v, *more)


def _accepts(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> bool:
    """What torch's kernels lack, and short sequences, whose time is in the launches."""
    queries, keys = q.shape[1], k.shape[1]
    lacking = bias is not None or sinks is not None or a.softcap is not None or mask is not None
    fits = queries >= FEWEST and (lacking or (keys <= SHORT and len(q) * q.shape[2] * queries * keys < MUCH))
    return (fits or interpreted()) and _serves(q, k, v, a, bias, sinks)


@attend.register("triton", devices="cuda", accepts=_accepts)
def _(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> Tensor:
    shape = (len(q), q.shape[2], q.shape[1], k.shape[1])  # what mask and bias are broadcast to
    shown = [None if t is None else t.expand(shape) for t in (mask, bias)]
    strides = [(0, 0, 0, 0) if t is None else t.stride() for t in shown]
    out = q.new_empty(q.shape)
    _launch(q, k, v, None, *shown, sinks, out, a, False, strides)
    return out


@attend_packed.register("triton", devices="cuda", accepts=lambda q, k, v, starts, a, sinks: _serves(q, k, v, a, sinks))
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, a: Attention, sinks: Tensor | None) -> Tensor:
    out = q.new_empty(q.shape)
    _launch(
        *(t.unsqueeze(0) for t in (q, k, v)), starts.contiguous(), None, None, sinks, out, a, a.causal, [(0,) * 4] * 2
    )
    return out


def _even(keys: int, shown: tuple[Tensor | None, ...], strides: Any) -> bool:
    """Whether there is a mask or a bias, and every row of them begins and ends at multiples of sixteen numbers."""
    here = [(t, s) for t, s in zip(shown, strides, strict=True) if t is not None]
    at = [keys, *(t.data_ptr() for t, _ in here), *(n for _, s in here for n in s[:3])]
    return bool(here) and all(n % 16 == 0 for n in at)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    a: Attention,
    causal: bool,
    strides: Any,
) -> None:
    """q (batch, queries, heads, head_dim), or with `starts` (1, tokens, heads, head_dim)."""
    batch, queries, heads, dim = q.shape
    sequences = batch if starts is None else len(starts) - 1
    dot = torch.float32 if interpreted() and q.dtype == torch.bfloat16 else torch.promote_types(q.dtype, k.dtype)
    average = queries if starts is None else cdiv(queries, max(sequences, 1))
    shape = rows_launch(average, batch * queries, heads, dim, dot == torch.float32, processors(q.device))
    if starts is None:
        tiles = batch * cdiv(queries, shape.rows)
    else:
        tiles = (queries + sequences * (shape.rows - 1)) // shape.rows
    kernel = attend_even if _even(k.shape[1], (mask, bias), strides) else attend_rows
    with on(q):
        kernel[(tiles, heads)](
            q,
            k,
            v,
            starts,
            mask,
            bias,
            None if sinks is None else dense(sinks),
            out,
            sequences,
            queries,
            k.shape[1],
            a.scale,
            a.softcap,
            a.window,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *strides[0],
            *strides[1],
            CAUSAL=causal,
            PADDING=mask is not None and strides[0][2] == 0,
            HEAD_DIM=dim,
            GROUP=heads // k.shape[2],
            ROWS=shape.rows,
            KEYS=shape.keys,
            DIM=shape.dim,
            DOT=getattr(tl, str(dot).removeprefix("torch.")),
            num_warps=shape.warps,
            num_stages=shape.stages,
            **dependent(q.device),
        )
