"""What lies between the product that makes queries, keys and values and their attention, in one pass over its rows:
clip, norms of the heads, rotation, and the way of keys and values into their pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.linear import Matrix, linear
from hasten.ops.norm import NormLayer, norm
from hasten.ops.pages import Slots
from hasten.ops.region import qkv
from hasten.ops.triton.arrange import cdiv, dense, on, power_of_2, served
from hasten.ops.triton.launch import dependent, go, wait
from hasten.ops.triton.settle import vectors
from hasten.spec import Attention, Rope


@triton.jit
def load_own(q_own, k_own, lane, i, own_head, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """What the norms of the heads `lane` hold at i: queries' or keys', zeros for values and where there is none."""
    own = tl.zeros((lane.shape[0], i.shape[0]), tl.float32)
    if q_own is not None:
        query, key = (lane < HEADS)[:, None], ((lane >= HEADS) & (lane < HEADS + KV_HEADS))[:, None]
        known = (i < HEAD_DIM)[None, :]
        q = tl.load(q_own + (lane * own_head)[:, None] + i[None, :], mask=query & known, other=0.0)
        k = tl.load(k_own + ((lane - HEADS) * own_head)[:, None] + i[None, :], mask=key & known, other=0.0)
        own = tl.where(query, q, k).to(tl.float32)
    return own


@triton.jit
def weighed(y, w, b, mean, factor, normed, offset, ROUNDED: tl.constexpr, DTYPE: tl.constexpr):
    """Rows y with their mean and factor taken out and weights put on, where `normed`: norm.py's `normalized`."""
    z = (y - mean) * factor
    if ROUNDED:
        w = (offset + w.to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
        z = z.to(DTYPE).to(tl.float32) * w
    else:
        z = z * (offset + w)
    return tl.where(normed, z + b, y)


@triton.jit
def load_clipped(at, inside, clip):
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if clip is not None:
        y = tl.where(y > clip, clip, tl.where(y < -clip, -clip, y))
    return y


@triton.jit
def keep(at, row, i, y, inside):
    tl.store(at + row[:, None] + i[None, :], y.to(at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("slots", "count", "period"))
def turn_heads(
    y,
    q_own,
    k_own,
    q_bias,
    k_bias,
    cos,
    sin,
    q,
    keys,
    values,
    slots,
    count,
    period,
    y_token,
    own_head,
    cos_token,
    sin_token,
    keys_slot,
    keys_head,
    values_slot,
    values_head,
    clip,
    eps,
    offset,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRING: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNING: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    TOTAL: tl.constexpr = HEADS + 2 * KV_HEADS
    HALF: tl.constexpr = TURNING // 2
    DTYPE: tl.constexpr = q.dtype.element_ty
    ROUNDED: tl.constexpr = NORM == "rms" and not WIDE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = row % TOTAL
    token = (row // TOTAL).to(tl.int64)
    i = tl.arange(0, DIM)
    present = row < count * TOTAL
    inside = present[:, None] & (i < HEAD_DIM)[None, :]
    # |---- first of each pair ----|---- second ----|---- dimensions that do not turn ----|   halves
    other = tl.where(i < HALF, i + HALF, tl.where(i < 2 * HALF, i - HALF, i))
    if NORM != "none":
        w = load_own(q_own, k_own, lane, i, own_head, HEADS, KV_HEADS, HEAD_DIM)
        b = load_own(q_bias, k_bias, lane, i, own_head, HEADS, KV_HEADS, HEAD_DIM)
        if PAIRING == "halves":
            w_other = load_own(q_own, k_own, lane, other, own_head, HEADS, KV_HEADS, HEAD_DIM)
            b_other = load_own(q_bias, k_bias, lane, other, own_head, HEADS, KV_HEADS, HEAD_DIM)
    wait(PDL)

    slot = token
    if slots is not None:
        slot = tl.load(slots + token, mask=present, other=-1).to(tl.int64)
    turned = (token % period)[:, None]
    at = y + token[:, None] * y_token + (lane * HEAD_DIM)[:, None]
    z = load_clipped(at + i[None, :], inside, clip)
    mean = tl.zeros((ROWS, 1), tl.float32)
    factor = mean
    normed = (lane < HEADS + KV_HEADS)[:, None]
    if NORM != "none":
        if NORM == "layer":
            mean = (tl.sum(z, 1) / HEAD_DIM)[:, None]
        gap = tl.where(inside, z - mean, 0.0)
        factor = tl.math.rsqrt(tl.sum(gap * gap, 1) / HEAD_DIM + eps)[:, None]
        z = weighed(z, w, b, mean, factor, normed, offset, ROUNDED, DTYPE)
    if PAIRING == "halves":
        z_other = load_clipped(at + other[None, :], inside, clip)
        if NORM != "none":
            z_other = weighed(z_other, w_other, b_other, mean, factor, normed, offset, ROUNDED, DTYPE)
        turns = present[:, None] & normed & (i < TURNING)[None, :]
        angle = tl.where(i < HALF, i, other)[None, :]
        c = tl.load(cos + turned * cos_token + angle, mask=turns, other=0.0).to(tl.float32)
        s = tl.load(sin + turned * sin_token + angle, mask=turns, other=0.0).to(tl.float32)
        z = tl.where(turns, z * c + tl.where(i < HALF, -1.0, 1.0)[None, :] * (z_other * s), z)
    if PAIRING == "neighbours":
        angle = tl.arange(0, DIM // 2)[None, :]
        turns = present[:, None] & normed & (angle < HALF)
        c = tl.load(cos + turned * cos_token + angle, mask=turns, other=0.0).to(tl.float32)
        s = tl.load(sin + turned * sin_token + angle, mask=turns, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(z, (ROWS, DIM // 2, 2)))
        first = tl.where(turns, even * c - odd * s, even)
        second = tl.where(turns, odd * c + even * s, odd)
        z = tl.reshape(tl.join(first, second), (ROWS, DIM))

    key, value = lane - HEADS, lane - HEADS - KV_HEADS
    kept = inside & (slot >= 0)[:, None]
    keep(q, (token * HEADS + lane) * HEAD_DIM, i, z, inside & (key < 0)[:, None])
    keep(keys, slot * keys_slot + key * keys_head, i, z, kept & ((key >= 0) & (value < 0))[:, None])
    keep(values, slot * values_slot + value * values_head, i, z, kept & (value >= 0)[:, None])


@dataclass(frozen=True, slots=True)
class TurnLaunch:
    rows: int  # heads of tokens
    dim: int
    warps: int


@lru_cache(1024)
def turn_launch(head_dim: int) -> TurnLaunch:
    """About 1,024 numbers a program, eight a thread."""
    dim = power_of_2(head_dim)
    return TurnLaunch(rows=max(1, 1024 // dim), dim=dim, warps=4)


def _accepts(
    x: Tensor,
    before: NormLayer | None,
    m: Matrix,
    a: Attention,
    q_norm: NormLayer | None,
    k_norm: NormLayer | None,
    turn: tuple[Tensor, Tensor] | None,
    into: Slots | None,
) -> bool:
    norms = [n for n in (q_norm, k_norm) if n is not None]
    alike = len({n.spec for n in norms}) < 2 and len(norms) in (0, 2)
    owns = [t for n in norms for t in vectors(n) if t is not None]
    turning = a.position.dim if turn is not None and isinstance(a.position, Rope) else 0
    pools = () if into is None else (into.keys, into.values)
    straight = all(t.stride(-1) == 1 for t in (*owns, *pools)) and x.dim() > 1
    # an encoder without any of it takes its heads out of the product as they lie
    asked = bool(norms) or into is not None or a.clip is not None or turning > 0
    fits = asked and straight and alike and turning <= a.head_dim <= 1024
    return fits and served(x, m.bias, *owns, *(turn or ()), *pools)


@qkv.register("triton", devices="cuda", accepts=_accepts, invariant=True)
def _(
    x: Tensor,
    before: NormLayer | None,
    m: Matrix,
    a: Attention,
    q_norm: NormLayer | None,
    k_norm: NormLayer | None,
    turn: tuple[Tensor, Tensor] | None,
    into: Slots | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    lead = x.shape[:-1]
    y = linear(x if before is None else norm(x, before), m)
    clip = a.clip
    if a.qk_norm_span == "width" and q_norm is not None and k_norm is not None:
        y, clip, q_norm, k_norm = _normed(y, a, q_norm, k_norm), None, None, None
    q = y.new_empty((*lead, a.heads, a.head_dim))
    if into is not None:
        _run(y, a, q_norm, k_norm, turn, clip, q, into.keys.flatten(0, 1), into.values.flatten(0, 1), into.slots)
        return q, None, None
    k, v = (y.new_empty((*lead, a.kv_heads, a.head_dim)) for _ in range(2))
    _run(y, a, q_norm, k_norm, turn, clip, q, *(t.view(-1, a.kv_heads, a.head_dim) for t in (k, v)), None)
    return q, k, v


def _normed(y: Tensor, a: Attention, q_norm: NormLayer, k_norm: NormLayer) -> Tensor:
    """y clipped, with norms over all queries and over all keys of a row."""
    if a.clip is not None:
        y = y.clamp(-a.clip, a.clip)
    q, k, v = y.split((a.q_width, a.kv_width, a.kv_width), -1)
    return torch.cat((norm(q, q_norm), norm(k, k_norm), v), -1)


def _run(
    y: Tensor,
    a: Attention,
    q_norm: NormLayer | None,
    k_norm: NormLayer | None,
    turn: tuple[Tensor, Tensor] | None,
    clip: float | None,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None,
) -> None:
    """From y (..., heads and twice kv_heads, one after the other) to q and to slots of keys and values."""
    if not y.numel():
        return
    flat, spec = dense(y).flatten(0, -2), None if q_norm is None else q_norm.spec
    (q_own, q_bias), (k_own, k_bias) = vectors(q_norm), vectors(k_norm)
    r = a.position if turn is not None and isinstance(a.position, Rope) else None
    cos = sin = None
    period = 1
    if r is not None and turn is not None:
        cos, sin, period = _angles(turn, y.shape[:-1])
    shape = turn_launch(a.head_dim)
    with on(y):
        turn_heads[(cdiv(len(flat) * (a.heads + 2 * a.kv_heads), shape.rows),)](
            flat,
            q_own,
            k_own,
            q_bias,
            k_bias,
            cos,
            sin,
            q,
            keys,
            values,
            None if slots is None else slots.contiguous(),
            len(flat),
            period,
            flat.stride(0),
            0 if q_own is None or q_own.dim() == 1 else a.head_dim,
            0 if cos is None else cos.stride(0),
            0 if sin is None else sin.stride(0),
            *keys.stride()[:2],
            *values.stride()[:2],
            clip,
            0.0 if spec is None else spec.eps,
            0.0 if spec is None else spec.offset,
            NORM="none" if spec is None else spec.kind,
            WIDE=spec is not None and spec.wide,
            PAIRING="none" if r is None else r.pairing,
            HEADS=a.heads,
            KV_HEADS=a.kv_heads,
            HEAD_DIM=a.head_dim,
            TURNING=0 if r is None else r.dim,
            ROWS=shape.rows,
            DIM=shape.dim,
            num_warps=shape.warps,
            **dependent(y.device),
        )


def _angles(turn: tuple[Tensor, Tensor], lead: torch.Size) -> tuple[Tensor, Tensor, int]:
    """cos and sin of (period, dim / 2): that of token t of `lead` is row t modulo the period."""
    cos, sin = turn
    own = cos.shape[:-1]
    while own and own[0] == 1:
        own = own[1:]
    if own != lead[len(lead) - len(own) :]:
        cos, sin = (t.expand(*lead, -1) for t in turn)
    cos, sin = (dense(t).reshape(-1, t.shape[-1]) for t in (cos, sin))
    return cos, sin, len(cos)
