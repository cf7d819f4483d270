"""Attention by torch's fused kernels, which never write the scores to memory.

cuDNN is the fastest of them on an H100 (causal prompts of 2,048 tokens at 396 TFLOP/s, FlashAttention at 207), but
makes a plan for every new shape, which takes milliseconds: a decoder whose keys grow by one each step must not meet
it. FlashAttention serves the rest. Neither takes a mask: the memory-efficient kernel does.

None of them has soft-caps or sinks, and a bias has to come in q's dtype, which in 16 bits loses distances: so biases
are taken of float32 queries only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.ops.attention import attend
from hasten.spec import Attention

CUDNN_QUERIES = 512  # fewer do not save what a plan costs,
CUDNN_SCORES = 2**25  # unless there are so many: 64 images of 197 patches take 60 us, by FlashAttention 86
TENSOR_CORE = frozenset((torch.float16, torch.bfloat16))


def plain(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> bool:
    """Whether torch has a kernel; none of them has an answer where there are no queries or no keys."""
    here = q.numel() > 0 and k.shape[1] > 0 and q.dtype == k.dtype == v.dtype and q.dtype != torch.float64
    exact = bias is None or q.dtype == torch.float32
    return here and exact and a.softcap is None and sinks is None and a.head_dim <= 256


def unmasked(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> bool:
    bare = mask is None and bias is None and q.dtype in TENSOR_CORE
    return bare and a.head_dim % 8 == 0 and plain(q, k, v, a, mask, bias, sinks)


def long(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> bool:
    scores = len(q) * q.shape[2] * q.shape[1] * k.shape[1]
    worth = q.shape[1] >= CUDNN_QUERIES or (q.shape[1] > 1 and scores >= CUDNN_SCORES)
    return worth and a.head_dim <= 128 and unmasked(q, k, v, a, mask, bias, sinks)


@attend.register("cudnn", devices="cuda", accepts=long)
def _(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> Tensor:
    return _by(SDPBackend.CUDNN_ATTENTION, q, k, v, a, None)


@attend.register("flash", devices="cuda", accepts=unmasked)
def _(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> Tensor:
    return _by(SDPBackend.FLASH_ATTENTION, q, k, v, a, None)


@attend.register("efficient", devices="cuda", accepts=plain)
def _(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> Tensor:
    group = q.shape[2] // k.shape[2]
    seen = _allowed(mask, bias)
    if group > 1 and q.shape[1] == 1 and (seen is None or seen.shape[1] == 1):
        # one query per head: the heads that share keys become the queries of one head, and the keys are read once
        folded = q.reshape(len(q), k.shape[2], group, q.shape[-1]).transpose(1, 2)
        y = _by(SDPBackend.EFFICIENT_ATTENTION, folded, k, v, a, seen)
        return y.transpose(1, 2).reshape(q.shape)
    if group > 1:  # this kernel shares no keys
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    return _by(SDPBackend.EFFICIENT_ATTENTION, q, k, v, a, seen)


def _allowed(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """mask and float32 bias as one tensor of four axes: bool, or added to the scores."""
    if bias is not None:
        bias = bias.float()
        mask = bias if mask is None else torch.where(mask, bias, -math.inf)
    return None if mask is None else mask[(None,) * (4 - mask.dim())]


def _by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, a: Attention, seen: Tensor | None) -> Tensor:
    """One of torch's kernels, its plain composition behind it where this build of torch lacks the kernel."""
    shared = k.shape[2] < q.shape[2]
    with sdpa_kernel([kernel, SDPBackend.MATH]):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, seen, scale=a.scale, enable_gqa=shared)
    return y.transpose(1, 2)
