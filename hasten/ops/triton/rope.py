"""Rotation of heads by the angles of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.rope import rope
from hasten.ops.triton.arrange import cdiv, dense, on, power_of_2, rows, served
from hasten.ops.triton.launch import dependent, go, wait
from hasten.spec import Rope


@triton.jit(do_not_specialize=("count",))
def rotate(
    x,
    cos,
    sin,
    out,
    count,
    heads,
    half,
    head_dim,
    x_token,
    x_head,
    cos_token,
    sin_token,
    PAIRING: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (row < count)[:, None]
    token = (row // heads).to(tl.int64)
    source = x + (token * x_token + (row % heads).to(tl.int64) * x_head)[:, None]
    target = out + row.to(tl.int64)[:, None] * head_dim
    pair = tl.arange(0, HALF)[None, :]
    inside = present & (pair < half)
    wait(PDL)
    c = tl.load(cos + token[:, None] * cos_token + pair, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + token[:, None] * sin_token + pair, mask=inside, other=0.0).to(tl.float32)
    if PAIRING == "halves":
        a = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + half + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + pair, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
        tl.store(target + half + pair, (b * c + a * s).to(out.dtype.element_ty), mask=inside)
    else:
        i = tl.arange(0, 2 * HALF)[None, :]
        both = present & (i < 2 * half)
        y = tl.load(source + i, mask=both, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(y, (ROWS, HALF, 2)))
        y = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, 2 * HALF))
        tl.store(target + i, y.to(out.dtype.element_ty), mask=both)
    if TAIL:
        i = 2 * half + tl.arange(0, TAIL)[None, :]
        still = present & (i < head_dim)
        tl.store(target + i, tl.load(source + i, mask=still, other=0.0), mask=still)


@dataclass(frozen=True, slots=True)
class RopeLaunch:
    rows: int
    half: int
    tail: int  # 0: every dimension turns
    warps: int


@lru_cache(1024)
def rope_launch(dim: int, head_dim: int) -> RopeLaunch:
    """About 1,024 pairs a program, eight a thread."""
    half = power_of_2(dim // 2)
    tail = power_of_2(head_dim - dim) if head_dim > dim else 0
    return RopeLaunch(rows=max(1, 1024 // half), half=half, tail=tail, warps=4)


def _accepts(x: Tensor, cos: Tensor, sin: Tensor, r: Rope) -> bool:
    return x.dim() > 1 and 0 < r.dim <= x.shape[-1] and cos.shape[-1] == r.dim // 2 and served(x, cos, sin)


@rope.register("triton", devices="cuda", accepts=_accepts, invariant=True)
def _(x: Tensor, cos: Tensor, sin: Tensor, r: Rope) -> Tensor:
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    half, head_dim, three = r.dim // 2, x.shape[-1], rows(x)
    cos, sin = (dense(t).expand(*x.shape[:-2], half).reshape(-1, half) for t in (cos, sin))
    outer, heads, _ = three.shape
    shape = rope_launch(r.dim, head_dim)
    with on(x):
        rotate[(cdiv(outer * heads, shape.rows),)](
            three,
            cos,
            sin,
            out,
            outer * heads,
            heads,
            half,
            head_dim,
            *three.stride()[:2],
            cos.stride(0),
            sin.stride(0),
            PAIRING=r.pairing,
            ROWS=shape.rows,
            HALF=shape.half,
            TAIL=shape.tail,
            num_warps=shape.warps,
            **dependent(x.device),
        )
    return out
