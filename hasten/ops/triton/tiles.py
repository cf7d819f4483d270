"""Tiles over sequences whose lengths the host does not know, and the answers of programs that share a tile.

A tile holds up to QUERIES new tokens of one sequence. Sequence r's first tile is number
(starts[r] + r (QUERIES - 1)) // QUERIES, which leaves room for every tile before it.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def gather(partial, peaks, totals, first, splits, m, i, inside, HEAD_DIM: tl.constexpr, AHEAD: tl.constexpr):
    """(peak, total, sum of values) over what `splits` programs left, AHEAD of them in flight at a time.

    Reads past the first-level cache, which does not see what other processors write.
    """
    ROWS: tl.constexpr = m.shape[0]
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, i.shape[0]), tl.float32)
    for start in range(0, splits, AHEAD):
        for ahead in tl.static_range(AHEAD):
            split = start + ahead
            at = (first + split) * ROWS + m
            here = (m >= 0) & (split < splits)  # a whole row of it, or nothing
            left = tl.load(peaks + at, mask=here, other=float("-inf"), cache_modifier=".cg")
            higher = tl.maximum(peak, left)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shrink, weight = tl.math.exp2(peak - base), tl.math.exp2(left - base)
            total = total * shrink + weight * tl.load(totals + at, mask=here, other=0.0, cache_modifier=".cg")
            sums = partial + at[:, None] * HEAD_DIM + i[None, :]
            z = tl.load(sums, mask=inside & (split < splits), other=0.0, cache_modifier=".cg")
            y = y * shrink[:, None] + weight[:, None] * z
            peak = higher
    return peak, total, y
