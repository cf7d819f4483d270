"""Calls of every op at the shapes of real models: what the report compiles and predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten.ops import TABLE, Choice, EmbedLayer, Matrix, NormLayer, Slots
from hasten.parallel.symmetric import Symmetric, mailbox
from hasten.spec import Attention, Head, Mlp, Moe, Norm, Rope, Tokens

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
        arguments = self.make(self.dtype)
        made = (i for i in TABLE[self.op].implementations if i.backend == "triton")
        next(i.run for i in made if i.accepts(*arguments))(*arguments)


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
    heads: tuple[int, int, int],
    tokens: int,
    sequences: int,
    d: torch.dtype,
    extra: str = "",
    pages: int = 128,
    **more: Any,
) -> tuple[Any, ...]:
    """Sequences of as many pages of 16 tokens, a step where each has one new token; extra: slopes or sinks."""
    h, kv, dim = heads
    a = Attention(h, kv, dim, dim**-0.5, True, "", **more)
    keys, values = torch.empty(2, 8, 16, kv, dim, dtype=d)
    tables, starts, lengths = (
        torch.empty(*s, dtype=torch.int32) for s in ((sequences, pages), (sequences + 1,), (sequences,))
    )
    own: dict[str, Tensor] = {extra: torch.empty(h)}
    q = torch.empty(tokens, h, dim, dtype=d)
    steps = tokens == sequences
    return q, keys, values, tables, None if steps else starts, lengths, a, own.get("slopes"), own.get("sinks")


def _embed(tokens: int, width: int, d: torch.dtype, **more: Any) -> tuple[Any, ...]:
    e = Tokens(1000, width, **more)
    ids, tables = torch.empty(tokens, dtype=torch.int64), (1000, e.positions, e.types)
    typed = ids if e.types else None
    return ids, ids, typed, EmbedLayer(e, *(torch.empty(n, width, dtype=d) if n else None for n in tables))


def _advance(rows: int, d: torch.dtype) -> tuple[Any, ...]:
    tokens, ids, positions, slots = torch.empty(4, rows, dtype=torch.int64)
    lengths, tables, count = (torch.empty(*s, dtype=torch.int32) for s in ((rows,), (rows, 128), (1,)))
    return tokens, ids, positions, lengths, slots, tables, 16, torch.empty(8, rows, dtype=torch.int64), count


def _sample(rows: int, vocabulary: int, used: str, d: torch.dtype) -> tuple[Any, ...]:
    """used: t temperature, k top-k, p top-p."""
    t, k, p = torch.empty(rows), torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float64)
    c = Choice(t if "t" in used else None, top_k=k if "k" in used else None, top_p=p if "p" in used else None)
    return torch.empty(rows, vocabulary, dtype=d), c, p if "t" in used else None, None, None


def _matrix(height: int, columns: int, bias: bool, d: torch.dtype) -> Matrix:
    return Matrix(torch.empty(height, columns, dtype=d), torch.empty(height, dtype=d) if bias else None)


def _linear(rows: int, height: int, columns: int, d: torch.dtype) -> tuple[Any, ...]:
    return torch.empty(rows, columns, dtype=d), _matrix(height, columns, False, d)


def _head(rows: int, height: int, columns: int, d: torch.dtype) -> tuple[Any, ...]:
    return torch.empty(rows, columns, dtype=d), None, _matrix(height, columns, False, d), Head(False, softcap=30.0)


def _up(rows: int, columns: int, mlp: Mlp, d: torch.dtype) -> tuple[Any, ...]:
    m = _matrix(mlp.width * (2 if mlp.gated else 1), columns, mlp.bias, d)
    return torch.empty(rows, columns, dtype=d), None, m, mlp


def _project(rows: int, height: int, columns: int, d: torch.dtype) -> tuple[Any, ...]:
    return *_linear(rows, height, columns, d), torch.empty(rows, height, dtype=d), None, None, 1.0, None


def _settle(width: int, inner: Norm | None, outer: Norm | None, d: torch.dtype) -> tuple[Any, ...]:
    norms = (None if n is None else _norm((4, width), n, d)[1] for n in (inner, outer))
    return *torch.empty(2, 4, width, dtype=d), *norms, 0.5, torch.empty(width, dtype=d)


class Mailed(Symmetric):
    """Eight ranks whose memory nobody reads."""

    def __init__(self) -> None:
        self.rank, self.size = 3, 8
        self.mailbox = mailbox(self.rank, [0] * self.size, torch.empty(1, dtype=torch.int64))


def _settle_over(rows: int, width: int, d: torch.dtype) -> tuple[Any, ...]:
    return *torch.empty(2, rows, width, dtype=d), None, None, 1.0, None, Mailed()


def _qkv(heads: tuple[int, int, int], r: Rope | None, own: Norm | None, d: torch.dtype) -> tuple[Any, ...]:
    """Of 80 narrow rows, whose product is nobody's kernel here, into pages."""
    h, kv, dim = heads
    a = Attention(h, kv, dim, dim**-0.5, True, "", position=r, qk_norm=own)
    norms = (None if own is None else _norm((4, dim), own, d)[1] for _ in range(2))
    turn = None if r is None else torch.empty(2, 80, r.dim // 2).unbind()
    keys, values = torch.empty(2, 8, 16, kv, dim, dtype=d)
    into = Slots(keys, values, torch.empty(80, dtype=torch.int64))
    return torch.zeros(80, 8, dtype=d), None, _matrix((h + 2 * kv) * dim, 8, False, d), a, *norms, turn, into


@dataclass(frozen=True, slots=True)
class Mixture:
    """Sizes of a mixture of experts."""

    experts: int
    top_k: int
    width: int
    inner: int
    act: str = "silu"
    biased: bool = False

    @property
    def spec(self) -> Moe:
        return Moe(self.experts, self.top_k, Mlp(self.inner, self.act, True, self.biased), True)

    def matrix(self, rows: int, columns: int, d: torch.dtype) -> Matrix:
        """A stack in which all experts are one, since nobody reads it."""
        weight = torch.empty(1, rows, columns, dtype=d).expand(self.experts, -1, -1)
        return Matrix(weight, torch.empty(self.experts, rows, dtype=d) if self.biased else None)


def _route(of: Mixture, tokens: int, d: torch.dtype) -> tuple[Any, ...]:
    return torch.empty(tokens, of.width, dtype=d), Matrix(torch.empty(of.experts, of.width, dtype=d)), of.spec


def _experts(of: Mixture, tokens: int, d: torch.dtype) -> tuple[Any, ...]:
    up, down = of.matrix(2 * of.inner, of.width, d), of.matrix(of.width, of.inner, d)
    shares, which = torch.empty(tokens, of.top_k), torch.empty(tokens, of.top_k, dtype=torch.int64)
    return torch.empty(tokens, of.width, dtype=d), shares, which, up, down, of.spec


MIXTRAL, QWEN3 = Mixture(8, 2, 4096, 14336), Mixture(128, 8, 2048, 768)
GPT_OSS = Mixture(32, 4, 2880, 2880, "clamped_swiglu", True)


RMS, LAYER = Norm("rms", 1e-6), Norm("layer", 1e-5, bias=True)
LLAMA, GEMMA, PHI, GPT2, GPTJ, FALCON, OSS, BLOOM = (
    (32, 8, 128),
    (8, 4, 256),
    (32, 32, 80),
    (12, 12, 64),
    (16, 16, 256),
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
    Sample("attend_pages", "32 on 32 x 128, alibi, 1 token", F16, partial(_attend, BLOOM, 1, 1, extra="slopes")),
    Sample("attend_pages", "32 on 32 x 80, 16 tokens of 16", F32, partial(_attend, PHI, 16, 16)),
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
    Sample("embed", "1 x 4096", BF16, partial(_embed, 1, 4096)),
    Sample("embed", "128 x 768, positions, types", F16, partial(_embed, 128, 768, positions=512, types=2)),
    Sample("advance", "1 row", F32, partial(_advance, 1)),
    Sample("advance", "128 rows", F32, partial(_advance, 128)),
    Sample("advance", "3000 rows", F32, partial(_advance, 3000)),
    Sample("sample", "likeliest, 1 x 128256", BF16, partial(_sample, 1, 128256, "")),
    Sample("sample", "drawn, 1 x 128256", BF16, partial(_sample, 1, 128256, "t")),
    Sample("sample", "drawn, 128 x 128256", BF16, partial(_sample, 128, 128256, "t")),
    Sample("sample", "top-k and top-p, 1 x 128256", BF16, partial(_sample, 1, 128256, "tkp")),
    Sample("sample", "top-p, 128 x 128256", F32, partial(_sample, 128, 128256, "tp")),
    Sample("linear", "6144 x 4096, 2 rows", BF16, partial(_linear, 2, 6144, 4096)),
    Sample("linear", "6144 x 4096, 5 rows", F32, partial(_linear, 5, 6144, 4096)),
    Sample("up", "gated silu, 28672 x 4096, 32 rows", BF16, partial(_up, 32, 4096, Mlp(14336, "silu", True, False))),
    Sample("up", "gelu_tanh, 6400 x 1600, 64 rows", F16, partial(_up, 64, 1600, Mlp(6400, "gelu_tanh", False, True))),
    Sample("project", "4096 x 14336, 16 rows", BF16, partial(_project, 16, 4096, 14336)),
    Sample("project", "4096 x 4096, 64 rows", BF16, partial(_project, 64, 4096, 4096)),
    Sample("head", "50257 x 1600, soft-cap, 8 rows", F16, partial(_head, 8, 50257, 1600)),
    Sample("settle", "both norms, 4096", BF16, partial(_settle, 4096, RMS, RMS)),
    Sample("settle", "both norms, 16384", F32, partial(_settle, 16384, LAYER, LAYER)),
    Sample("settle", "outer norm, 768", F16, partial(_settle, 768, None, LAYER)),
    Sample("settle_over", "1 x 4096, 8 ranks", BF16, partial(_settle_over, 1, 4096)),
    Sample("settle_over", "16 x 4096, 8 ranks", F32, partial(_settle_over, 16, 4096)),
    Sample("qkv", "32 on 8 x 128, halves", BF16, partial(_qkv, LLAMA, Rope(128, 1e4, "halves"), None)),
    Sample("qkv", "32 on 8 x 128, halves, norms of heads", BF16, partial(_qkv, LLAMA, Rope(128, 1e4, "halves"), RMS)),
    Sample("qkv", "32 on 32 x 80, halves, 32 of 80", F16, partial(_qkv, PHI, Rope(32, 1e4, "halves"), None)),
    Sample("qkv", "16 on 16 x 256, neighbours, 64", F32, partial(_qkv, GPTJ, Rope(64, 1e4, "neighbours"), None)),
    Sample("qkv", "12 on 12 x 64", F16, partial(_qkv, GPT2, None, None)),
    Sample("route", "8 x 4096, 1 token", BF16, partial(_route, MIXTRAL, 1)),
    Sample("route", "128 x 2048, 8 tokens", BF16, partial(_route, QWEN3, 8)),
    Sample("experts", "Mixtral, 1 token", BF16, partial(_experts, MIXTRAL, 1)),
    Sample("experts", "Qwen3-MoE, 8 tokens", BF16, partial(_experts, QWEN3, 8)),
    Sample("experts", "GPT-OSS, 1 token", BF16, partial(_experts, GPT_OSS, 1)),
    Sample("experts", "Mixtral, 64 tokens", BF16, partial(_experts, MIXTRAL, 64)),
    Sample("experts", "GPT-OSS, 2048 tokens", BF16, partial(_experts, GPT_OSS, 2048)),
    Sample("experts", "Qwen3-MoE, 2048 tokens", F32, partial(_experts, QWEN3, 2048)),
)
