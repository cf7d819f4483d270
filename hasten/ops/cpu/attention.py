"""Attention by torch's fused kernel, which never writes the scores to memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.attention import attend
from hasten.spec import Attention


def plain(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> bool:
    """The kernel knows neither soft-caps nor sinks, and has no answer where there are no keys."""
    return a.softcap is None and sinks is None and k.shape[1] > 0


@attend.register("torch", devices="cpu", accepts=plain)
def _(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> Tensor:
    allowed = _allowed(q.dtype, mask, bias)
    kv_heads, k, v = k.shape[2], k.transpose(1, 2), v.transpose(1, 2)
    if q.shape[1] == 1 and kv_heads < q.shape[2] and (allowed is None or allowed.shape[1] == 1):
        # one query per head: the heads that share keys become the queries of one head, and the keys are read once
        folded = q.reshape(len(q), kv_heads, -1, q.shape[-1])
        return F.scaled_dot_product_attention(folded, k, v, allowed, scale=a.scale).reshape(q.shape)
    shared = kv_heads < q.shape[2]
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, allowed, scale=a.scale, enable_gqa=shared)
    return y.transpose(1, 2)


def _allowed(dtype: torch.dtype, mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """mask and bias as one tensor of four axes: bool, or added to the scores in float32 or wider."""
    if bias is not None:
        bias = bias.to(torch.promote_types(dtype, torch.float32))
        mask = bias if mask is None else torch.where(mask, bias, -math.inf)
    return mask if mask is None else mask[(None,) * (4 - mask.dim())]
