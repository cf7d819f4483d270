"""Pages on the CPU: neighbouring ones are read and written where they lie, and a sequence attends by itself.

A pool is contiguous, so a sequence whose pages are neighbours is one view of it. Only the keys that a window lets the
sequence see are looked at. Gathering several sequences into one padded call was measured too: copying the keys costs
more than the calls it saves, except for a few dozen tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.attention import attend
from hasten.ops.pages import attend_pages, write_pages
from hasten.spec import Attention


@write_pages.register("torch", devices="cpu")
def _(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    where = slots.tolist()
    if not where or min(where) < 0:
        return write_pages.reference(k, v, keys, values, slots)
    run = where == list(range(where[0], where[0] + len(where)))
    for new, pool in ((k, keys), (v, values)):
        tokens = pool.view(-1, *pool.shape[2:])
        if run:
            tokens[where[0] : where[0] + len(where)].copy_(new)
        else:
            tokens.index_copy_(0, slots.long(), new.to(pool.dtype))
    return None


@attend_pages.register("torch", devices="cpu")
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
    bounds, out = range(len(lengths) + 1) if starts is None else starts.tolist(), []
    for r, length in enumerate(lengths.tolist()):
        new = q[bounds[r] : bounds[r + 1]]
        if not len(new):
            continue
        if not length:
            out.append(torch.zeros_like(new))
            continue
        behind = 0 if a.window is None else max(length - len(new) - a.window + 1, 0)
        k, v = _tokens((keys, values), tables[r], behind, length)
        out.append(_causal(new[None], k, v, a, slopes, sinks)[0])
    rest = len(q) - bounds[-1]  # tokens that belong to no sequence
    return out[0] if len(out) == 1 and not rest else torch.cat([*out, torch.zeros_like(q[:rest])])


def _tokens(pools: tuple[Tensor, Tensor], table: Tensor, first: int, last: int) -> list[Tensor]:
    """Keys and values first to last of a sequence, (1, tokens, kv_heads, head_dim): views if its pages allow."""
    size = pools[0].shape[1]
    skipped = first // size
    table = table[skipped : -(-last // size)]
    pages = table.tolist()
    if pages == list(range(pages[0], pages[0] + len(pages))):
        origin = (pages[0] - skipped) * size
        return [pool.flatten(0, 1)[None, origin + first : origin + last] for pool in pools]
    own = slice(first - skipped * size, last - skipped * size)
    return [pool.index_select(0, table).flatten(0, 1)[None, own] for pool in pools]


def _causal(q: Tensor, k: Tensor, v: Tensor, a: Attention, slopes: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Attention of the newest tokens of one sequence over k and v, which end with their own."""
    queries, count = q.shape[1], k.shape[1]
    if queries == 1 and slopes is None:
        return attend(q, k, v, a, None, None, sinks)
    whole = queries == count and (a.window is None or a.window >= count)
    if whole and slopes is None and sinks is None and a.softcap is None:
        shared = k.shape[2] < q.shape[2]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=a.scale, enable_gqa=shared)
        return y.transpose(1, 2)
    distance = torch.arange(count) - torch.arange(count - queries, count).unsqueeze(-1)
    seen = distance <= 0
    if a.window is not None:
        seen &= distance > -a.window
    bias = None if slopes is None else slopes.view(-1, 1, 1) * distance
    return attend(q, k, v, a, seen, bias, sinks)
