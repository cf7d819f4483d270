"""The experts that a few tokens take: the product with the router and the choice among its scores, in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.linear import Matrix
from hasten.ops.moe import route
from hasten.ops.triton.arrange import cdiv, dense, on, power_of_2, served
from hasten.ops.triton.curves import sigmoid
from hasten.ops.triton.launch import dependent, go, wait
from hasten.ops.workspace import counters
from hasten.spec import Moe

MOST_TOKENS = 64  # beyond, a product of matrices reads the router once for all of them
NO_EXPERT = tl.constexpr(-1e30)  # exp and sigmoid of it are nothing, and it is less than any logit
WIDEST = 16384  # columns: a row of the router in the registers of eight warps


@triton.jit
def choose_experts(
    logits,
    shares,
    which,
    experts,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP: tl.constexpr,
):
    """From logits (EXPERTS,), NO_EXPERT behind the last expert, to the best TOP_K shares and experts, best first."""
    e, j = tl.arange(0, logits.shape[0]), tl.arange(0, TOP)
    if SCORE == "softmax":
        scores = tl.exp(logits - tl.max(logits, 0))
        scores /= tl.sum(scores, 0)
    else:
        scores = sigmoid(logits)
    broken = tl.sum(tl.where(scores != scores, scores, 0.0), 0)  # NaN, if there is one
    left = tl.where(e < experts, scores, -1.0)
    best, chosen = tl.zeros((TOP,), tl.float32), tl.zeros((TOP,), tl.int64)
    for i in range(TOP_K):
        score = tl.max(left, 0)
        at = tl.min(tl.where(left == score, e, experts - 1), 0)
        best = tl.where(j == i, score, best)
        chosen = tl.where(j == i, at, chosen)
        left = tl.where(e == at, -1.0, left)
    if RENORMALIZE:
        best /= tl.sum(best, 0)
    tl.store(shares + j, best + broken, mask=j < TOP_K)
    tl.store(which + j, chosen, mask=j < TOP_K)


@triton.jit
def route_token(
    x,
    router,
    bias,
    shares,
    which,
    logits,
    arrived,
    experts,
    width,
    x_row,
    router_row,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    token = tl.program_id(0)
    n, k, e = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    inside = (n < experts)[:, None] & (k < width)[None, :]
    w = tl.load(router + n.to(tl.int64)[:, None] * router_row + k[None, :], mask=inside, other=0.0)
    added = tl.zeros((ROWS,), tl.float32)
    if bias is not None:
        added = tl.load(bias + n, mask=n < experts, other=0.0).to(tl.float32)
    wait(PDL)
    y = tl.load(x + token.to(tl.int64) * x_row + k, mask=k < width, other=0.0).to(tl.float32)
    product = (tl.sum(w.to(tl.float32) * y[None, :], 1) + added).to(x.dtype.element_ty)  # rounded as a linear layer's
    tl.store(logits + token * experts + n, product.to(tl.float32), mask=n < experts)
    tl.debug_barrier()  # every thread's stores come before the one thread's release below
    if tl.atomic_add(arrived + token, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        tl.store(arrived + token, 0)
        # past the first-level cache, which does not see what other processors write
        all_of_them = tl.load(logits + token * experts + e, e < experts, NO_EXPERT, cache_modifier=".cg")
        at = token.to(tl.int64) * TOP_K
        choose_experts(all_of_them, shares + at, which + at, experts, SCORE, RENORMALIZE, TOP_K, TOP)


@dataclass(frozen=True, slots=True)
class RouteLaunch:
    rows: int
    block: int
    warps: int


@lru_cache(1024)
def route_launch(width: int) -> RouteLaunch:
    """16,384 weights a program, 64 a thread, so that all are on their way before the wait."""
    block = max(power_of_2(width), 128)
    return RouteLaunch(rows=min(max(1, 16384 // block), 16), block=block, warps=8)


def _accepts(x: Tensor, router: Matrix, m: Moe) -> bool:
    return len(x) <= MOST_TOKENS and x.shape[1] <= WIDEST and served(x, router.decode(), router.bias)


@route.register("triton", devices="cuda", accepts=_accepts)
def _(x: Tensor, router: Matrix, m: Moe) -> tuple[Tensor, Tensor]:
    (tokens, width), x, w = x.shape, dense(x), dense(router.decode())
    shares = torch.empty(tokens, m.top_k, dtype=torch.float32, device=x.device)
    which = torch.empty(tokens, m.top_k, dtype=torch.int64, device=x.device)
    if not tokens:
        return shares, which
    shape = route_launch(width)
    with on(x):
        route_token[(tokens, cdiv(m.experts, shape.rows))](
            x,
            w,
            router.bias,
            shares,
            which,
            torch.empty(tokens * m.experts, dtype=torch.float32, device=x.device),
            counters(tokens, x.device),
            m.experts,
            width,
            x.stride(0),
            w.stride(0),
            SCORE=m.score,
            RENORMALIZE=m.renormalize,
            TOP_K=m.top_k,
            TOP=power_of_2(m.top_k),
            EXPERTS=power_of_2(m.experts),
            ROWS=shape.rows,
            BLOCK=shape.block,
            num_warps=shape.warps,
            **dependent(x.device),
        )
    return shares, which
