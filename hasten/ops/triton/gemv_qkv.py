"""The region qkv of one token: norm, product, bias, clip, rotation, and keys and values into their pages."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.linear import Matrix
from hasten.ops.norm import NormLayer
from hasten.ops.pages import Slots
from hasten.ops.region import qkv
from hasten.ops.triton.arrange import cdiv, on, served
from hasten.ops.triton.gemv import (
    load_numbers,
    load_row,
    load_rows,
    norm_arguments,
    one_row,
    products,
    row_norm,
)
from hasten.ops.triton.gemv_launch import gemv_launch
from hasten.ops.triton.launch import dependent, go, wait
from hasten.spec import Attention, Rope


@triton.jit(do_not_specialize=("slots",))
def gemv_qkv(
    x,
    w,
    bias,
    norm_weight,
    norm_bias,
    cos,
    sin,
    q,
    keys,
    values,
    slots,
    w_row,
    eps,
    clip,
    keys_slot,
    keys_head,
    values_slot,
    values_head,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNING: tl.constexpr,
    PAIRING: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2
    TOTAL: tl.constexpr = (HEADS + 2 * KV_HEADS) * HALF
    p = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = p < TOTAL
    head = p // HALF
    j = p % HALF
    # |---- a of the turning pairs ----|---- b ----|---- dimensions that stay, two and two ----|   halves
    i = 2 * j
    other = i + 1
    if PAIRING == "halves":
        i = tl.where(j < TURNING // 2, j, i)
        other = tl.where(j < TURNING // 2, j + TURNING // 2, other)
    n = head[:, None] * HEAD_DIM + tl.join(i, other)  # (pairs, 2): one sum serves both of a pair
    both = tl.reshape(n, (2 * PAIRS,))
    present = tl.reshape(tl.broadcast_to(inside[:, None], (PAIRS, 2)), (2 * PAIRS,))
    tile = load_rows(w, both, present, w_row, COLUMNS, BLOCK)
    g, b = load_row(norm_weight, COLUMNS, BLOCK), load_row(norm_bias, COLUMNS, BLOCK)
    added = load_numbers(bias, both, present)
    wait(PDL)
    slot = tl.cast(0, tl.int64)
    if slots is not None:
        slot = tl.load(slots).to(tl.int64)
    if TURNING:
        turns = inside & (j < TURNING // 2) & (head < HEADS + KV_HEADS)
        c = tl.load(cos + j, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + j, mask=turns, other=0.0).to(tl.float32)
    a = products(x, tile, g, b, eps, NORM, OFFSET, COLUMNS, BLOCK) + added
    if clip is not None:
        a = tl.minimum(tl.maximum(a, -clip), clip)
    first, second = tl.split(tl.reshape(a, (PAIRS, 2)))
    if TURNING:
        first, second = first * c - second * s, second * c + first * s
    key = head - HEADS
    value = head - HEADS - KV_HEADS
    kept = inside & (slot >= 0)
    _store(q + head * HEAD_DIM, i, other, first, second, inside & (key < 0))
    _store(keys + slot * keys_slot + key * keys_head, i, other, first, second, kept & (key >= 0) & (value < 0))
    _store(values + slot * values_slot + value * values_head, i, other, first, second, kept & (value >= 0))


@triton.jit
def _store(at, i, other, first, second, inside):
    tl.store(at + i, first.to(at.dtype.element_ty), mask=inside)
    tl.store(at + other, second.to(at.dtype.element_ty), mask=inside)


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
    plain = q_norm is None and k_norm is None and a.head_dim % 2 == 0 and one_row(x, m) and row_norm(before)
    pools = () if into is None else (into.keys, into.values)
    turns = turn is None or (isinstance(a.position, Rope) and all(t.stride(-1) == 1 and served(t) for t in turn))
    return plain and turns and all(p.stride(-1) == 1 and served(p) for p in pools)


@qkv.register("triton", devices="cuda", accepts=_accepts)
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
    lead, w = x.shape[:-1], m.weight
    q = x.new_empty((*lead, a.heads, a.head_dim))
    k = v = slots = None
    if into is None:
        k, v = (x.new_empty((*lead, a.kv_heads, a.head_dim)) for _ in range(2))
        keys, values = (t.view(1, a.kv_heads, a.head_dim) for t in (k, v))  # (slots, kv_heads, head_dim)
    else:
        keys, values, slots = into.keys.flatten(0, 1), into.values.flatten(0, 1), into.slots
    weight, bias, eps, offset, kind = norm_arguments(before)
    turning, pairing = 0, "neighbours"
    if turn is not None and isinstance(a.position, Rope):
        turning, pairing = a.position.dim, a.position.pairing
    cos, sin = turn or (None, None)
    pairs = (a.heads + 2 * a.kv_heads) * a.head_dim // 2
    shape = gemv_launch(pairs, w.shape[1], w.element_size(), True, x.device)
    with on(x):
        gemv_qkv[(cdiv(pairs, shape.rows),)](
            x.contiguous(),
            w,
            m.bias,
            weight,
            bias,
            cos,
            sin,
            q,
            keys,
            values,
            slots,
            w.stride(0),
            eps,
            a.clip,
            *keys.stride()[:2],
            *values.stride()[:2],
            NORM=kind,
            OFFSET=offset,
            HEADS=a.heads,
            KV_HEADS=a.kv_heads,
            HEAD_DIM=a.head_dim,
            TURNING=turning,
            PAIRING=pairing,
            PAIRS=shape.rows,
            COLUMNS=w.shape[1],
            BLOCK=shape.block,
            num_warps=shape.warps,
            **dependent(x.device),
        )
    return q, k, v
