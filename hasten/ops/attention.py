"""Attention over keys and values that lie side by side, and the biases that depend on distance."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from hasten.ops.table import op
from hasten.spec import Alibi, Attention, Buckets


@op
def attend(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """softmax(q k^T scale) v, in float32 or wider, as (batch, queries, heads, head_dim) in q's dtype.

    q (batch, queries, heads, head_dim); k and v (batch, keys, kv_heads, head_dim); a kv head serves heads / kv_heads
    consecutive heads. mask: bool, True where visible, broadcastable to (batch, heads, queries, keys); None: everything
    is visible, whatever `a.causal` and `a.window` say, which are the caller's to put into the mask. bias: added to the
    scaled, soft-capped scores, broadcastable likewise. sinks (heads,): logits beside the keys'. A query that sees
    nothing gets zeros.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bshd,bthd->bhst", q.to(wide), k.to(wide)) * a.scale
    if a.softcap is not None:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    share = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[1]]
    return torch.einsum("bhst,bthd->bshd", share, v.to(wide)).to(q.dtype)


def alibi_slopes(a: Alibi, heads: int) -> Tensor:
    """float32 (heads,): powers of two for the largest power of two of heads, then every other one between them."""
    if a.among is not None:
        first, total = a.among
        return alibi_slopes(replace(a, among=None), total)[first : first + heads]
    base = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-a.steepest * i / base) for i in range(1, base + 1)]
    rest = [2 ** (-a.steepest / 2 * i / base) for i in range(1, 2 * (heads - base) + 1, 2)]
    return torch.tensor(first + rest)


def bucket(distance: Tensor, b: Buckets) -> Tensor:
    """The bucket of each distance = key position - query position."""
    count, out = b.count, torch.zeros_like(distance)
    if b.bidirectional:
        count //= 2
        out = out + (distance > 0) * count
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = count // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(b.max_distance / exact)
    far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
    return out + torch.where(distance < exact, distance, far)
