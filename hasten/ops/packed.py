"""Attention of sequences that lie end to end, without padding between them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hasten.ops.attention import attend
from hasten.ops.table import op
from hasten.spec import Attention


@op
def attend_packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, a: Attention, sinks: Tensor | None) -> Tensor:
    """Attention of every sequence over itself, as (tokens, heads, head_dim) in q's dtype.

    q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim): sequence r at rows starts[r] to starts[r + 1];
    starts (sequences + 1,) int begins with 0 and ends with `tokens`. A query sees all of its sequence, unless
    `a.causal` and `a.window` hide what is behind it or too far before it. sinks as in `attend`.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first, last in pairwise(starts.tolist()):
        if first < last:
            own = (part[None, first:last] for part in (q, k, v))
            out[first:last] = attend(*own, a, _visible(last - first, a, q.device), None, sinks)[0]
    return out


def _visible(tokens: int, a: Attention, where: torch.device) -> Tensor | None:
    """(tokens, tokens), or None where every query sees every key."""
    if not a.causal or tokens == 1:
        return None
    here = torch.arange(tokens, device=where)
    ago = here.unsqueeze(-1) - here
    return ago >= 0 if a.window is None else (ago >= 0) & (ago < a.window)
