"""New keys and values into their pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.pages import write_pages
from hasten.ops.triton.arrange import cdiv, dense, on, power_of_2, served
from hasten.ops.triton.launch import dependent, go, wait


@triton.jit(do_not_specialize=("slots",))
def store_slots(
    k,
    v,
    keys,
    values,
    slots,
    kv_heads,
    head_dim,
    k_token,
    k_head,
    v_token,
    v_head,
    keys_slot,
    keys_head,
    values_slot,
    values_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    i = tl.arange(0, DIM)[None, :]
    inside = (slot >= 0) & (head < kv_heads) & (i < head_dim)
    wait(PDL)
    key = tl.load(k + token * k_token + head * k_head + i, mask=inside, other=0.0)
    value = tl.load(v + token * v_token + head * v_head + i, mask=inside, other=0.0)
    key, value = key.to(tl.float32), value.to(tl.float32)
    tl.store(keys + slot * keys_slot + head * keys_head + i, key.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + slot * values_slot + head * values_head + i, value.to(values.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class WriteLaunch:
    heads: int
    dim: int
    warps: int


@lru_cache(1024)
def write_launch(kv_heads: int, head_dim: int) -> WriteLaunch:
    """At most 2,048 numbers of k and as many of v a program, eight of each a thread."""
    dim = power_of_2(head_dim)
    heads = min(power_of_2(kv_heads), max(1, 2048 // dim))
    return WriteLaunch(heads=heads, dim=dim, warps=min(max(heads * dim // 256, 1), 8))


def _accepts(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> bool:
    return keys.stride(-1) == values.stride(-1) == 1 and served(k, v, keys, values)


@write_pages.register("triton", devices="cuda", accepts=_accepts, invariant=True)
def _(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    tokens, kv_heads, head_dim = k.shape
    if not k.numel():
        return
    k, v = dense(k), dense(v)
    flat_keys, flat_values = (pool.view(-1, kv_heads, head_dim) for pool in (keys, values))  # (slots, heads, dim)
    shape = write_launch(kv_heads, head_dim)
    with on(k):
        store_slots[(tokens, cdiv(kv_heads, shape.heads))](
            k,
            v,
            flat_keys,
            flat_values,
            slots.contiguous(),
            kv_heads,
            head_dim,
            *k.stride()[:2],
            *v.stride()[:2],
            *flat_keys.stride()[:2],
            *flat_values.stride()[:2],
            HEADS=shape.heads,
            DIM=shape.dim,
            num_warps=shape.warps,
            **dependent(k.device),
        )
