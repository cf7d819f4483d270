"""Arguments for every op: small and awkward. CASES[op][name](dtype) makes the positional arguments of one call."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hasten.ops import ACTS, GATED, rope_table
from hasten.ops.sample import Choice
from hasten.spec import Rope
from tests.ops.arguments import Maker, convert, matrix, norm_layer, random, strided, tensors
from tests.ops.attention_cases import ATTENDS, PACKED, PAGES, WRITES
from tests.ops.region_cases import EXPERTS, HEADS, PROJECTS, PROJECTS_NORMED, QKVS, ROUTES, SETTLES, SETTLES_OVER, UPS
from tests.ops.stack_cases import STACKS
from tests.ops.step_cases import ADVANCES, EMBEDS

__all__ = ["CASES", "convert", "tensors"]

# ---- norm, act, gated, linear, rope


def norm_case(shape: tuple[int, ...], own: tuple[int, ...], d: torch.dtype, gap: bool = False, **more: Any) -> Any:
    x = random(*shape, dtype=d)
    return strided(x) if gap else x, norm_layer(d, *own, **more)


NORMS: dict[str, Maker] = {
    "layer": partial(norm_case, (2, 3, 37), (37,)),
    "layer without bias": partial(norm_case, (5, 64), (64,), bias=False),
    "layer, one plus weight": partial(norm_case, (5, 64), (64,), offset=1.0),
    "layer, one row": partial(norm_case, (1, 7), (7,)),
    "layer, empty": partial(norm_case, (0, 8), (8,)),
    "layer, strided": partial(norm_case, (3, 4, 33), (33,), gap=True),
    "layer per head": partial(norm_case, (2, 3, 5, 16), (5, 16), bias=False),
    "rms": partial(norm_case, (2, 3, 37), (37,), kind="rms", bias=False),
    "rms, wide": partial(norm_case, (2, 3, 37), (37,), kind="rms", bias=False, wide=True),
    "rms, gemma": partial(norm_case, (4, 40), (40,), kind="rms", bias=False, wide=True, offset=1.0),
    "rms, one row": partial(norm_case, (1, 1, 130), (130,), kind="rms", bias=False),
    "rms, empty": partial(norm_case, (2, 0, 8), (8,), kind="rms", bias=False),
    "rms, strided": partial(norm_case, (3, 33), (33,), kind="rms", bias=False, gap=True),
    "rms per head": partial(norm_case, (2, 3, 5, 16), (5, 16), kind="rms", bias=False),
}


def linear_case(shape: tuple[int, ...], rows: int, d: torch.dtype, bias: bool = True, gap: bool = False) -> Any:
    x = random(*shape, dtype=d)
    return strided(x) if gap else x, matrix(d, rows, shape[-1], bias=bias)


def wider_weights(d: torch.dtype) -> tuple[Any, ...]:
    return random(3, 17, dtype=d), matrix(torch.float32, 5, 17)


LINEARS: dict[str, Maker] = {
    "three axes": partial(linear_case, (2, 3, 37), 19),
    "without bias": partial(linear_case, (9, 64), 33, bias=False),
    "one row": partial(linear_case, (1, 1, 37), 19),
    "one row, strided": partial(linear_case, (1, 37), 19, gap=True),
    "one row, without bias": partial(linear_case, (1, 37), 19, bias=False),
    "one vector": partial(linear_case, (37,), 19),
    "empty": partial(linear_case, (0, 16), 8),
    "strided": partial(linear_case, (5, 24), 7, gap=True),
    "wider weights": wider_weights,
}


def rope_case(shape: tuple[int, ...], dim: int, pairing: str, d: torch.dtype, gap: bool = False) -> tuple[Any, ...]:
    r = Rope(dim, 100.0, pairing)  # type: ignore[arg-type]
    x = random(*shape, dtype=d)
    cos, sin = rope_table(r, torch.arange(7, 7 + shape[-3]).expand(shape[:-2]), 64)
    return strided(x) if gap else x, cos, sin, r


ROPES: dict[str, Maker] = {
    f"{pairing}, {name}": partial(rope_case, shape, dim, pairing, gap=name == "strided")
    for pairing in ("halves", "neighbours")
    for name, shape, dim in (
        ("whole", (2, 3, 5, 16), 16),
        ("partial", (2, 3, 3, 20), 12),
        ("one token", (1, 1, 4, 8), 8),
        ("tokens end to end", (6, 4, 8), 8),
        ("empty", (0, 4, 8), 8),
        ("strided", (2, 3, 2, 16), 8),
    )
}


def halves(shape: tuple[int, ...], kind: str, d: torch.dtype, gap: bool = False) -> tuple[Any, ...]:
    x = random(*shape, dtype=d, scale=3.0)
    return strided(x) if gap else x, kind


# ---- sampling


def sample_case(d: torch.dtype, rows: int = 5, penalties: bool = False, **choice: Any) -> tuple[Any, ...]:
    told = {name: torch.tensor([value] * rows) for name, value in choice.items()}
    uniform = torch.rand(rows, dtype=torch.float64) if "temperature" in choice else None
    tokens = [torch.randint(-1, 23, (rows, n)) for n in (4, 3)] if penalties else [None, None]
    return random(rows, 23, dtype=d, scale=2.0), Choice(**told), uniform, *tokens


SAMPLES: dict[str, Maker] = {
    "likeliest": sample_case,
    "drawn": partial(sample_case, temperature=0.7),
    "filtered": partial(sample_case, temperature=1.5, top_k=5, top_p=0.8, min_p=0.05),
    "penalized": partial(sample_case, penalties=True, repetition=1.3, presence=0.5, frequency=0.25),
    "one row": partial(sample_case, rows=1, temperature=1.0),
}

SHAPES = {"three axes": (2, 3, 38), "one row": (1, 26), "empty": (0, 8)}
CASES: dict[str, dict[str, Maker]] = {
    "norm": NORMS,
    "act": {f"{kind}, {name}": partial(halves, s, kind) for kind in ACTS for name, s in SHAPES.items()}
    | {"gelu, strided": partial(halves, (3, 34), "gelu", gap=True)},
    "gated": {f"{kind}, {name}": partial(halves, s, kind) for kind in GATED for name, s in SHAPES.items()}
    | {"silu, strided": partial(halves, (3, 34), "silu", gap=True)},
    "linear": LINEARS,
    "rope": ROPES,
    "embed": EMBEDS,
    "advance": ADVANCES,
    "attend": ATTENDS,
    "attend_packed": PACKED,
    "attend_pages": PAGES,
    "write_pages": WRITES,
    "route": ROUTES,
    "sample": SAMPLES,
    "experts": EXPERTS,
    "qkv": QKVS,
    "project": PROJECTS,
    "project_normed": PROJECTS_NORMED,
    "settle": SETTLES,
    "settle_over": SETTLES_OVER,
    "up": UPS,
    "head": HEADS,
    "stack": STACKS,
}
