"""Keys and values in pages: writing into them and attending over them.

A pool is (pages, page size, kv_heads, head_dim), one for keys and one for values. A sequence owns a list of pages, not
necessarily neighbours; its token t lies in page table[t // size] at offset t % size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.ops.attention import attend
from hasten.ops.table import op, op_by_rows
from hasten.spec import Attention


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Where the new tokens of one layer go: its pools, and slots (tokens,) int = page * size + offset in them."""

    keys: Tensor
    values: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """What new tokens look back at over pages, as `attend_pages` takes it: all layers share it, but for the slopes."""

    tables: Tensor
    starts: Tensor | None
    lengths: Tensor
    slopes: Tensor | None


@op_by_rows
def write_pages(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store k and v, (tokens, kv_heads, head_dim), at slots = page * size + offset; a negative slot is skipped."""
    kept = slots >= 0
    where = slots[kept]
    keys.view(-1, *keys.shape[2:])[where] = k[kept].to(keys.dtype)
    values.view(-1, *values.shape[2:])[where] = v[kept].to(values.dtype)


@op
def attend_pages(
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
    """Causal attention of many sequences' newest tokens over their pages, as (tokens, heads, head_dim).

    q (tokens, heads, head_dim): the sequences end to end, sequence r at rows starts[r] to starts[r + 1].
    tables (sequences, most pages) int: page numbers, anything behind a sequence's last page.
    starts (sequences + 1,) int, or None where every sequence has one new token.
    lengths (sequences,) int: tokens of each sequence in the cache, these included; a sequence of none gets zeros.
    slopes (heads,): alibi, multiplied by key position - query position. `a.window` counts the query itself.
    """
    out, size = torch.zeros_like(q), keys.shape[1]
    bounds = range(len(lengths) + 1) if starts is None else starts.tolist()
    for r, length in enumerate(lengths.tolist()):
        first, last = bounds[r], bounds[r + 1]
        if not length:
            continue
        pages = tables[r, : -(-length // size)].long()
        k, v = (pool[pages].flatten(0, 1)[:length] for pool in (keys, values))
        here = torch.arange(length - (last - first), length, device=q.device).unsqueeze(-1)
        distance = torch.arange(length, device=q.device) - here
        seen = distance <= 0
        if a.window is not None:
            seen &= distance > -a.window
        bias = None if slopes is None else slopes.view(-1, 1, 1) * distance
        out[first:last] = attend.reference(q[None, first:last], k[None], v[None], a, seen, bias, sinks)[0]
    return out
