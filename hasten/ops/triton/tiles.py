"""What kernels of attention over pages share: tiles over sequences whose lengths the host does not know, pages, dtypes.

A tile holds up to QUERIES new tokens of one sequence. Sequence r's first tile is number
(starts[r] + r (QUERIES - 1)) // QUERIES, which leaves room for every tile before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.triton.arrange import interpreted
from hasten.ops.triton.curves import tanh


def operands(q: Tensor, keys: Tensor, values: Tensor) -> torch.dtype:
    """What the matrix products take: the interpreter multiplies bfloat16 wrongly."""
    widest = torch.promote_types(q.dtype, torch.promote_types(keys.dtype, values.dtype))
    return torch.float32 if interpreted() and widest == torch.bfloat16 else widest


@triton.jit
def places(table, key, stop, page_row, token_row, PAGE: tl.constexpr, PDL: tl.constexpr):
    """Offsets (keys, 1) into the pools of positions `key`; those from `stop` on get the page of the last one before.

    A loop whose stages the compiler makes would give the load of a page stages of its own, if it knew it for a load,
    and ask for keys only when the block before them is done.
    """
    at = table + tl.minimum(key, tl.maximum(stop - 1, 0)) // PAGE
    if not PDL:
        page = tl.load(at)
    elif table.dtype.element_ty == tl.int64:
        page = tl.inline_asm_elementwise(
            "ld.global.nc.b64 $0, [$1];", "=l,l", [at.to(tl.int64)], dtype=tl.int64, is_pure=True, pack=1
        )
    else:
        page = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    return (page.to(tl.int64) * page_row + key % PAGE * token_row)[:, None]


@triton.jit
def sequence_of(starts, tile, sequences, QUERIES: tl.constexpr):
    """The last sequence whose first tile is not behind `tile`."""
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(starts + middle).to(tl.int32) + middle * (QUERIES - 1)) // QUERIES <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def absorb(
    query, k, v, key, here, stop, slope, scale, softcap, window, peak, total, y, DOT: tl.constexpr, WHOLE: tl.constexpr
):
    """(peak, total, y) of a softmax that has seen this block too. WHOLE: every row sees every key of it.

    peak: the largest logarithm to base two of what the softmax weighs, with scores capped and lowered by distance.
    """
    score, factor = tl.dot(query, tl.trans(k.to(DOT)), input_precision="ieee"), scale
    distance = key[None, :] - here[:, None]
    if softcap is not None:
        score, factor = softcap * tanh(score * (scale / softcap)), 1.0
    if slope is not None:
        score, factor = score * factor + slope[:, None] * distance.to(tl.float32), 1.0
    if not WHOLE:
        seen = (distance <= 0) & (key < stop)[None, :]
        if window is not None:
            seen &= distance > -window
        score = tl.where(seen, score, float("-inf"))
    factor *= 1.4426950408889634  # log2(e)
    higher = tl.maximum(peak, tl.max(score, 1) * factor)
    base = higher
    if not WHOLE:
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    share = tl.math.exp2(score * factor - base[:, None])
    shrink = tl.math.exp2(peak - base)
    y = y * shrink[:, None] + tl.dot(share.to(DOT), v.to(DOT), input_precision="ieee")
    return higher, total * shrink + tl.sum(share, 1), y


@triton.jit
def leave(partial, peaks, totals, at, m, i, rows, peak, total, y, HEAD_DIM: tl.constexpr):
    """Store what this program, number `at` of all, has of rows m below `rows`, for `gather`."""
    left, mine = at * rows + m, m < rows
    tl.store(peaks + left, peak, mask=mine)
    tl.store(totals + left, total, mask=mine)
    tl.store(partial + left[:, None] * HEAD_DIM + i[None, :], y, mask=mine[:, None] & (i < HEAD_DIM)[None, :])
    tl.debug_barrier()  # every thread's stores come before one thread's release


@triton.jit
def gather(partial, peaks, totals, first, splits, m, i, rows, HEAD_DIM: tl.constexpr, AHEAD: tl.constexpr):
    """(peak, total, y) of rows m below `rows` over what `splits` programs left, AHEAD of them in flight at a time.

    Reads past the first-level cache, which does not see what other processors write.
    """
    peak = tl.full((m.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((m.shape[0],), tl.float32)
    y = tl.zeros((m.shape[0], i.shape[0]), tl.float32)
    for start in range(0, splits, AHEAD):
        split = start + tl.arange(0, AHEAD)
        at = (first + split)[:, None] * rows + m[None, :]
        here = (split < splits)[:, None] & (m < rows)[None, :]
        left = tl.load(peaks + at, mask=here, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(totals + at, mask=here, other=0.0, cache_modifier=".cg")
        inside = here[:, :, None] & (i < HEAD_DIM)[None, None, :]
        left_y = partial + at[:, :, None] * HEAD_DIM + i[None, None, :]
        z = tl.load(left_y, mask=inside, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(left, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight, shrink = tl.math.exp2(left - base[None, :]), tl.math.exp2(peak - base)
        total = total * shrink + tl.sum(weight * sums, 0)
        y = y * shrink[:, None] + tl.sum(weight[:, :, None] * z, 0)
        peak = higher
    return peak, total, y


@triton.jit
def answer(out, sinks, m, i, token, tokens, head, heads, peak, total, y, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store rows m, the GROUP heads from `head` on of `tokens` tokens from `token` on; zeros where nothing was seen.

    heads: of one token in out. sinks: logits of each head that take a share and give no value.
    """
    if sinks is not None:
        sink = tl.load(sinks + head + m % GROUP).to(tl.float32) * 1.4426950408889634  # log2(e)
        base = tl.maximum(peak, sink)
        shrink = tl.math.exp2(peak - base)
        y, total = y * shrink[:, None], total * shrink + tl.math.exp2(sink - base)
    y = y / tl.where(total > 0.0, total, 1.0)[:, None]
    at = (((token + m // GROUP).to(tl.int64) * heads + head + m % GROUP) * HEAD_DIM)[:, None] + i[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(m < tokens * GROUP)[:, None] & (i < HEAD_DIM)[None, :])
