"""Calls with one row at the shapes of real models: a decode step of a single sequence, short behind its prompt."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hasten.ops import Matrix, Slots
from hasten.ops.triton.samples import (
    BF16,
    F16,
    F32,
    GPT2,
    LAYER,
    LLAMA,
    RMS,
    Sample,
    _attend,
    _linear,
    _matrix,
    _norm,
    _project,
)
from hasten.spec import Attention, Head, Mlp, Norm, Rope


def _qkv(heads: tuple[int, int, int], width: int, n: Norm, r: Rope | None, d: torch.dtype) -> tuple[Any, ...]:
    h, kv, dim = heads
    a = Attention(h, kv, dim, dim**-0.5, True, "", position=r)
    x, before = _norm((1, width), n, d)
    turn = None if r is None else torch.empty(2, 1, r.dim // 2).unbind()
    into = Slots(*torch.empty(2, 8, 16, kv, dim, dtype=d), torch.empty(1, dtype=torch.int64))
    return x, before, _matrix((h + 2 * kv) * dim, width, n.bias, d), a, None, None, turn, into


def _up(width: int, n: Norm, mlp: Mlp, d: torch.dtype) -> tuple[Any, ...]:
    x, before = _norm((1, width), n, d)
    return x, before, _matrix(mlp.width * (2 if mlp.gated else 1), width, mlp.bias, d), mlp


def _head(width: int, height: int, n: Norm, d: torch.dtype) -> tuple[Any, ...]:
    x, before = _norm((1, width), n, d)
    return x, before, Matrix(torch.empty(height, width, dtype=d)), Head(True)


HALVES = Rope(128, 1e4, "halves")
SILU, GELU = Mlp(14336, "silu", True, False), Mlp(10240, "gelu_tanh", False, True)
XL, NEO, SMALL_LLAMA = (25, 25, 64), (20, 20, 128), (32, 8, 64)

ONE_ROW = (
    Sample("qkv", "32 on 8 x 128, halves, 1 row", BF16, partial(_qkv, LLAMA, 4096, RMS, HALVES)),
    Sample("qkv", "25 on 25 x 64, 1 row", F16, partial(_qkv, XL, 1600, LAYER, None)),
    Sample("qkv", "20 on 20 x 128, 1 row", F16, partial(_qkv, NEO, 2560, LAYER, None)),
    Sample("qkv", "12 on 12 x 64, 1 row", F32, partial(_qkv, GPT2, 768, LAYER, None)),
    Sample("linear", "3072 x 5120, 1 row", BF16, partial(_linear, 1, 3072, 5120)),
    Sample("up", "gated silu, 28672 x 4096, 1 row", BF16, partial(_up, 4096, RMS, SILU)),
    Sample("up", "gelu_tanh, 10240 x 2560, 1 row", F16, partial(_up, 2560, LAYER, GELU)),
    Sample("project", "4096 x 14336, 1 row", BF16, partial(_project, 1, 4096, 14336)),
    Sample("project", "8192 x 28672, 1 row", BF16, partial(_project, 1, 8192, 28672)),
    Sample("project", "2560 x 10240, 1 row", F32, partial(_project, 1, 2560, 10240)),
    Sample("head", "128256 x 4096, 1 row", BF16, partial(_head, 4096, 128256, RMS)),
    Sample("attend_pages", "32 on 8 x 128, short, 1 token", BF16, partial(_attend, LLAMA, 1, 1, pages=32)),
    Sample("attend_pages", "32 on 8 x 64, short, 1 token", BF16, partial(_attend, SMALL_LLAMA, 1, 1, pages=32)),
    Sample("attend_pages", "25 on 25 x 64, short, 1 token", F16, partial(_attend, XL, 1, 1, pages=32)),
    Sample("attend_pages", "20 on 20 x 128, short, 1 token", F16, partial(_attend, NEO, 1, 1, pages=32)),
)
