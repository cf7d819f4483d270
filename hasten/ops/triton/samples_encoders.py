"""Calls of encoders at the shapes of BERT-large and ViT-L: a hundred rows or two, and thousands."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hasten.ops.triton.samples import BF16, F16, LAYER, Sample, _linear, _matrix, _norm, _up
from hasten.spec import Attention, Mlp, Norm


def _beside(batch: int, tokens: int, heads: int, head_dim: int, shown: bool, d: torch.dtype) -> tuple[Any, ...]:
    """Attention of an encoder's batch; shown: with a bias and a mask."""
    made = torch.empty(batch, tokens, 3 * heads, head_dim, dtype=d).split(heads, 2)
    a = Attention(heads, heads, head_dim, head_dim**-0.5, False, "")
    mask = torch.empty(batch, 1, 1, tokens, dtype=torch.bool) if shown else None
    return *made, a, mask, torch.empty(1, heads, tokens, tokens) if shown else None, None


def _packed(sequences: int, tokens: int, heads: int, head_dim: int, d: torch.dtype) -> tuple[Any, ...]:
    q, k, v, a, *_ = _beside(sequences, tokens, heads, head_dim, False, d)
    starts = torch.empty(sequences + 1, dtype=torch.int32)
    return *(t.flatten(0, 1) for t in (q, k, v)), starts, a, None


def _project_on(rows: int, height: int, columns: int, outer: Norm | None, d: torch.dtype) -> tuple[Any, ...]:
    """With a bias, and a norm of the sum where there is one."""
    n = None if outer is None else _norm((4, height), outer, d)[1]
    x, residual = torch.empty(rows, columns, dtype=d), torch.empty(rows, height, dtype=d)
    return x, _matrix(height, columns, True, d), residual, None, n, 1.0, None


def _project_normed(rows: int, height: int, columns: int, d: torch.dtype) -> tuple[Any, ...]:
    return *_project_on(rows, height, columns, None, d), _norm((4, height), LAYER, d)[1]


ENCODERS = (
    Sample("attend", "1 x 128 tokens, 16 x 64", F16, partial(_beside, 1, 128, 16, 64, False)),
    Sample("attend", "32 x 197 tokens, 16 x 64", F16, partial(_beside, 32, 197, 16, 64, False)),
    Sample("attend", "8 x 256 tokens, 12 x 64, bias and mask", BF16, partial(_beside, 8, 256, 12, 64, True)),
    Sample("attend_packed", "32 x 128 tokens, 16 x 64", F16, partial(_packed, 32, 128, 16, 64)),
    Sample("linear", "3072 x 1024, 128 rows", F16, partial(_linear, 128, 3072, 1024)),
    Sample("up", "gelu, 4096 x 1024, 128 rows", F16, partial(_up, 128, 1024, Mlp(4096, "gelu", False, True))),
    Sample("up", "gated silu, 4096 x 1024, 128 rows", BF16, partial(_up, 128, 1024, Mlp(2048, "silu", True, False))),
    Sample("up", "gelu, 4096 x 1024, 12608 rows", F16, partial(_up, 12608, 1024, Mlp(4096, "gelu", False, True))),
    Sample("project", "1024 x 4096, norm of the sum, 128 rows", F16, partial(_project_on, 128, 1024, 4096, LAYER)),
    Sample("project", "1024 x 4096, 12608 rows", F16, partial(_project_on, 12608, 1024, 4096, None)),
    Sample("project", "1024 x 1024, norm of the sum, 128 rows", F16, partial(_project_on, 128, 1024, 1024, LAYER)),
    Sample("project_normed", "1024 x 4096, 197 rows", F16, partial(_project_normed, 197, 1024, 4096)),
)
