"""Arguments for the regions of a block, a mixture's among them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten.ops import ACTS, GATED, Matrix, NormLayer, Slots, held, rope_table
from hasten.spec import Head, Mlp, Moe, Norm, Rope
from tests.ops.arguments import Maker, attention, matrix, norm_layer, random, strided

# ---- mixture of experts


def moe(experts: int, top_k: int, act: str = "silu", gated: bool = True, **more: Any) -> Moe:
    return Moe(experts, top_k, Mlp(6, act, gated, True), more.pop("renormalize", True), **more)


def route_case(m: Moe, d: torch.dtype, tokens: int = 5) -> tuple[Any, ...]:
    """Logits are permutations of evenly spaced numbers, so that no rounding swaps two experts."""
    spaced = torch.linspace(-2, 2, m.experts)
    x = torch.stack([spaced[torch.randperm(m.experts)] for _ in range(tokens)]) if tokens else torch.empty(0, m.experts)
    return x.to(d), Matrix(torch.eye(m.experts, dtype=d), spaced.to(d) / 64 if m.router_bias else None), m


ROUTES: dict[str, Maker] = {
    "renormalized": partial(route_case, moe(8, 2)),
    "not renormalized": partial(route_case, moe(5, 3, renormalize=False)),
    "sigmoid": partial(route_case, moe(4, 1, score="sigmoid", renormalize=False)),
    "biased": partial(route_case, moe(4, 2, router_bias=True)),
    "one token": partial(route_case, moe(6, 6), tokens=1),
    "empty": partial(route_case, moe(6, 2), tokens=0),
}


def experts_case(m: Moe, d: torch.dtype, tokens: int = 7, bias: bool = False, used: int | None = None) -> Any:
    used = m.experts if used is None else used  # only the first so many experts are chosen
    ranked = torch.rand(tokens, used).argsort(-1)
    shares = torch.rand(tokens, m.top_k).softmax(-1)
    up = matrix(d, m.here, (2 if m.expert.gated else 1) * m.expert.width, 9, bias=bias)
    down = matrix(d, m.here, 9, m.expert.width, bias=bias)
    return random(tokens, 9, dtype=d), shares, held(ranked[:, : m.top_k], m), up, down, m


EXPERTS: dict[str, Maker] = {
    "gated": partial(experts_case, moe(8, 2)),
    "plain, biased": partial(experts_case, moe(4, 2, "gelu", gated=False), bias=True),
    "clamped": partial(experts_case, moe(4, 2, "clamped_swiglu"), bias=True),
    "most unused": partial(experts_case, moe(16, 2), used=3),
    "one token": partial(experts_case, moe(8, 3), tokens=1),
    "some elsewhere": partial(experts_case, moe(6, 3, held=(2, 3)), bias=True),
    "some elsewhere, one token": partial(experts_case, moe(6, 4, "gelu", gated=False, held=(0, 2)), tokens=1),
    "all elsewhere": partial(experts_case, moe(8, 2, held=(6, 2)), used=5, bias=True),
    "empty": partial(experts_case, moe(4, 2), tokens=0),
}

# ---- regions


def qkv_case(
    shape: tuple[int, ...],
    d: torch.dtype,
    span: str | None = None,
    kind: str = "rms",
    before: bool = True,
    rope: tuple[int, str] | None = None,
    paged: bool = False,
    **more: Any,
) -> tuple[Any, ...]:
    width, own = shape[-1], {"head": ((8,), (8,)), "heads": ((4, 8), (2, 8)), "width": ((32,), (16,))}
    qk = None if span is None else Norm(kind, 1e-5, False)  # type: ignore[arg-type]
    norms = (None, None) if qk is None else tuple(NormLayer(qk, random(*s, dtype=d)) for s in own[span or "head"])
    position, turn = None, None
    if rope is not None:
        position = Rope(rope[0], 100.0, rope[1])  # type: ignore[arg-type]
        turn = rope_table(position, torch.arange(shape[-2]).expand(shape[:-1]), 64)
    a = attention(4, 2, 8, position=position, qk_norm=qk, qk_norm_span=span or "head", **more)
    n = norm_layer(d, width) if before else None
    into = None
    if paged:
        slots = torch.randperm(3 * 5)[: shape[0]]
        slots[1:2] = -1
        into = Slots(random(3, 5, 2, 8, dtype=d), random(3, 5, 2, 8, dtype=d), slots)
    return random(*shape, dtype=d), n, matrix(d, 64, width), a, *norms, turn, into


QKVS: dict[str, Maker] = {
    "plain": partial(qkv_case, (2, 3, 17), before=False),
    "normalized and rotated": partial(qkv_case, (2, 3, 17), rope=(8, "halves")),
    "one row, neighbours, partial": partial(qkv_case, (1, 1, 16), rope=(4, "neighbours")),
    "norm per head": partial(qkv_case, (5, 24), span="head", rope=(8, "halves")),
    "norm of every head": partial(qkv_case, (5, 24), span="heads", kind="layer", before=False),
    "norm of the width": partial(qkv_case, (2, 3, 24), span="width"),
    "clipped": partial(qkv_case, (2, 3, 24), clip=0.5),
    "into pages": partial(qkv_case, (3, 17), rope=(8, "halves"), paged=True),
    "one row into pages, neighbours": partial(qkv_case, (1, 16), rope=(4, "neighbours"), paged=True),
    "norm per head, into pages": partial(qkv_case, (4, 24), span="head", rope=(8, "halves"), paged=True),
    "empty": partial(qkv_case, (0, 24)),
}


def project_case(
    shape: tuple[int, ...],
    d: torch.dtype,
    inner: bool = False,
    outer: bool = False,
    scale: float = 1.0,
    own: bool = False,
) -> tuple[Any, ...]:
    x, residual = random(*shape, 23, dtype=d), random(*shape, 12, dtype=d)
    norms = (norm_layer(d, 12, kind="rms", bias=False) if inner else None, norm_layer(d, 12) if outer else None)
    return x, matrix(d, 12, 23), residual, *norms, scale, random(12, dtype=d) if own else None


PROJECTS: dict[str, Maker] = {
    "residual": partial(project_case, (2, 3)),
    "one row": partial(project_case, (1, 1)),
    "inner norm": partial(project_case, (2, 3), inner=True),
    "outer norm": partial(project_case, (2, 3), outer=True),
    "everything": partial(project_case, (11,), inner=True, outer=True, scale=0.3, own=True),
    "scale": partial(project_case, (2, 3), scale=0.22),
    "empty": partial(project_case, (0,)),
}


def project_normed_case(shape: tuple[int, ...], d: torch.dtype, **more: Any) -> tuple[Any, ...]:
    return *project_case(shape, d, **more), norm_layer(d, 12)


PROJECTS_NORMED: dict[str, Maker] = {
    "residual": partial(project_normed_case, (2, 3)),
    "one row": partial(project_normed_case, (1, 1)),
    "everything": partial(project_normed_case, (11,), inner=True, outer=True, scale=0.3, own=True),
    "empty": partial(project_normed_case, (0,)),
}


def settle_case(
    shape: tuple[int, ...],
    d: torch.dtype,
    inner: str | None = None,
    outer: str | None = None,
    scale: float = 1.0,
    own: bool = False,
    gap: bool = False,
    **more: Any,
) -> tuple[Any, ...]:
    width = shape[-1]
    y, residual = random(*shape, dtype=d), random(*shape, dtype=d)
    norms = (None if k is None else norm_layer(d, width, kind=k, bias=k == "layer", **more) for k in (inner, outer))
    own_scale = random(width, dtype=d) if own else None
    return strided(y) if gap else y, strided(residual) if gap else residual, *norms, scale, own_scale


SETTLES: dict[str, Maker] = {
    "residual": partial(settle_case, (2, 3, 37)),
    "inner norm": partial(settle_case, (5, 64), inner="rms"),
    "inner norm, gemma": partial(settle_case, (5, 40), inner="rms", wide=True, offset=1.0),
    "outer norm": partial(settle_case, (2, 3, 37), outer="layer"),
    "both norms": partial(settle_case, (3, 130), inner="layer", outer="rms"),
    "everything": partial(settle_case, (11, 12), inner="rms", outer="layer", scale=0.3, own=True),
    "scales": partial(settle_case, (1, 1, 33), scale=0.22, own=True),
    "one row": partial(settle_case, (1, 300), inner="layer"),
    "strided": partial(settle_case, (3, 4, 33), outer="rms", gap=True),
    "empty": partial(settle_case, (0, 8), outer="layer"),
}


@dataclass(frozen=True)
class Echo:
    """A group of two whose other rank has the same to say; it leaves arguments alone, which tests compare too."""

    rank: int = 0
    size: int = 2

    def all_reduce(self, t: Tensor) -> Tensor:
        return t * 2


def settle_over_case(make: Maker, d: torch.dtype) -> tuple[Any, ...]:
    return *make(d), Echo()


SETTLES_OVER: dict[str, Maker] = {name: partial(settle_over_case, make) for name, make in SETTLES.items()}


def up_case(
    shape: tuple[int, ...], act: str, gated: bool, d: torch.dtype, before: bool = True, gap: bool = False
) -> tuple[Any, ...]:
    x, width = random(*shape, dtype=d), shape[-1]
    m = matrix(d, 26 if gated else 13, width)
    return strided(x) if gap else x, norm_layer(d, width) if before else None, m, Mlp(13, act, gated, True)


UPS: dict[str, Maker] = {
    **{f"{act}, many rows": partial(up_case, (3, 5, 17), act, False) for act in ACTS},
    **{f"{act}, gated": partial(up_case, (2, 3, 17), act, True) for act in GATED},
    "one row": partial(up_case, (1, 17), "gelu_tanh", False),
    "without norm": partial(up_case, (9, 17), "gelu", False, before=False),
    "gelu_tanh, two dozen rows": partial(up_case, (2, 12, 17), "gelu_tanh", False),
    "strided, without norm": partial(up_case, (5, 17), "silu", False, before=False, gap=True),
    "empty": partial(up_case, (0, 17), "gelu", False),
}


def head_case(shape: tuple[int, ...], h: Head, d: torch.dtype, before: bool = False) -> tuple[Any, ...]:
    n = norm_layer(d, shape[-1], kind="rms", bias=False) if before else None
    return random(*shape, dtype=d), n, matrix(d, 101, shape[-1], bias=h.bias), h


HEADS: dict[str, Maker] = {
    "tied": partial(head_case, (2, 3, 17), Head(True)),
    "behind a norm": partial(head_case, (2, 17), Head(True), before=True),
    "one row behind a norm": partial(head_case, (1, 17), Head(True), before=True),
    "biased": partial(head_case, (3, 17), Head(False, bias=True)),
    "scaled and soft-capped": partial(head_case, (1, 17), Head(True, scale=0.25, softcap=3.0)),
    "empty": partial(head_case, (0, 17), Head(True)),
}
