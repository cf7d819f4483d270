"""Calls of every op at the shapes of real models: what the report compiles and predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten.ops import TABLE, NormLayer
from hasten.spec import Attention, Norm, Rope

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True, slots=True)
class Sample:
    """One call of an op, made when it is wanted."""

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.dtype], tuple[Any, ...]]

    def run(self) -> None:
        """Through Triton's launcher, on tensors that are never read."""
        launcher = next(i.run for i in TABLE[self.op].implementations if i.backend == "triton")
        launcher(*self.make(self.dtype))


def _norm(shape: tuple[int, ...], n: Norm, d: torch.dtype) -> tuple[Any, ...]:
    width = shape[-1]
    bias = torch.empty(width, dtype=d) if n.bias else None
    return torch.empty(shape, dtype=d), NormLayer(n, torch.empty(width, dtype=d), bias)


def _curve(width: int, kind: str, d: torch.dtype) -> tuple[Any, ...]:
    return torch.empty(4, width, dtype=d), kind


def _rope(heads: int, head_dim: int, r: Rope, d: torch.dtype) -> tuple[Any, ...]:
    cos, sin = torch.empty(2, 4, r.dim // 2)
    return torch.empty(4, heads, head_dim, dtype=d), cos, sin, r


def _write(kv_heads: int, head_dim: int, d: torch.dtype) -> tuple[Any, ...]:
    k, v = torch.empty(2, 4, kv_heads, head_dim, dtype=d)
    keys, values = torch.empty(2, 4, 16, kv_heads, head_dim, dtype=d)
    return k, v, keys, values, torch.empty(4, dtype=torch.int64)


def _attend(
    heads: tuple[int, int, int], tokens: int, sequences: int, d: torch.dtype, extra: str = "", **more: Any
) -> tuple[Any, ...]:
    """Sequences of up to 2,048 tokens in pages of 16; extra: slopes or sinks."""
    h, kv, dim = heads
    a = Attention(h, kv, dim, dim**-0.5, True, "", **more)
    keys, values = torch.empty(2, 8, 16, kv, dim, dtype=d)
    tables, starts, lengths = (
        torch.empty(*s, dtype=torch.int32) for s in ((sequences, 128), (sequences + 1,), (sequences,))
    )
    own: dict[str, Tensor] = {extra: torch.empty(h)}
    q = torch.empty(tokens, h, dim, dtype=d)
    return q, keys, values, tables, starts, lengths, a, own.get("slopes"), own.get("sinks")


RMS, LAYER = Norm("rms", 1e-6), Norm("layer", 1e-5, bias=True)
LLAMA, GEMMA, PHI, GPT2, FALCON, OSS, BLOOM = (
    (32, 8, 128),
    (8, 4, 256),
    (32, 32, 80),
    (12, 12, 64),
    (71, 1, 64),
    (64, 8, 64),
    (32, 32, 128),
)
CAPPED: dict[str, Any] = {"softcap": 50.0, "window": 4096}

SAMPLES = (
    Sample("norm", "rms, 4096", BF16, partial(_norm, (4, 4096), RMS)),
    Sample("norm", "rms, 4096", F32, partial(_norm, (4, 4096), RMS)),
    Sample("norm", "rms of heads, 128", BF16, partial(_norm, (4, 32, 128), RMS)),
    Sample("norm", "layer, 768", F16, partial(_norm, (4, 768), LAYER)),
    Sample("norm", "layer, 16384", F32, partial(_norm, (4, 16384), LAYER)),
    Sample("gated", "silu, 14336", BF16, partial(_curve, 28672, "silu")),
    Sample("gated", "silu, 14336", F32, partial(_curve, 28672, "silu")),
    Sample("gated", "gelu_tanh, 9216", F16, partial(_curve, 18432, "gelu_tanh")),
    Sample("gated", "clamped_swiglu, 2880", BF16, partial(_curve, 5760, "clamped_swiglu")),
    Sample("act", "gelu, 3072", F16, partial(_curve, 3072, "gelu")),
    Sample("rope", "halves, 128 of 128", BF16, partial(_rope, 32, 128, Rope(128, 1e4, "halves"))),
    Sample("rope", "halves, 128 of 128", F32, partial(_rope, 32, 128, Rope(128, 1e4, "halves"))),
    Sample("rope", "neighbours, 64 of 256", BF16, partial(_rope, 16, 256, Rope(64, 1e4, "neighbours"))),
    Sample("rope", "halves, 32 of 80", F16, partial(_rope, 32, 80, Rope(32, 1e4, "halves"))),
    Sample("write_pages", "8 x 128", BF16, partial(_write, 8, 128)),
    Sample("write_pages", "32 x 80", F16, partial(_write, 32, 80)),
    Sample("write_pages", "12 x 64", F32, partial(_write, 12, 64)),
    Sample("attend_pages", "32 on 8 x 128, 1 token", BF16, partial(_attend, LLAMA, 1, 1)),
    Sample("attend_pages", "32 on 8 x 128, 64 tokens of 64", BF16, partial(_attend, LLAMA, 64, 64)),
    Sample("attend_pages", "32 on 8 x 128, prompt", BF16, partial(_attend, LLAMA, 512, 1)),
    Sample("attend_pages", "32 on 8 x 128, mixed", BF16, partial(_attend, LLAMA, 515, 4)),
    Sample("attend_pages", "32 on 8 x 128, 1 token", F32, partial(_attend, LLAMA, 1, 1)),
    Sample("attend_pages", "32 on 8 x 128, prompt", F32, partial(_attend, LLAMA, 512, 1)),
    Sample("attend_pages", "12 on 12 x 64, 1 token", F16, partial(_attend, GPT2, 1, 1)),
    Sample("attend_pages", "32 on 32 x 80, prompt", F16, partial(_attend, PHI, 512, 1)),
    Sample("attend_pages", "8 on 4 x 256, soft-cap, window, 1 token", BF16, partial(_attend, GEMMA, 1, 1, **CAPPED)),
    Sample("attend_pages", "8 on 4 x 256, soft-cap, window, prompt", BF16, partial(_attend, GEMMA, 512, 1, **CAPPED)),
    Sample(
        "attend_pages",
        "64 on 8 x 64, sinks, window, 1 token",
        BF16,
        partial(_attend, OSS, 1, 1, extra="sinks", window=128),
    ),
    Sample("attend_pages", "32 on 32 x 128, alibi, mixed", F16, partial(_attend, BLOOM, 100, 4, extra="slopes")),
    Sample("attend_pages", "71 on 1 x 64, 1 token", BF16, partial(_attend, FALCON, 1, 1)),
)
