"""The regions of a block that one kernel can compute: compositions of their parts, which are their references.

A block is qkv, attend, out, up, down. `out` and `down` are the same function, `project`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.ops.act import act, gated
from hasten.ops.linear import Matrix, linear
from hasten.ops.norm import NormLayer, norm
from hasten.ops.pages import Slots, write_pages
from hasten.ops.rope import rope
from hasten.ops.settle import settle
from hasten.ops.table import op_by_rows
from hasten.spec import Attention, Head, Mlp, Rope


@op_by_rows
def qkv(
    x: Tensor,
    before: NormLayer | None,
    m: Matrix,
    a: Attention,
    q_norm: NormLayer | None,
    k_norm: NormLayer | None,
    turn: tuple[Tensor, Tensor] | None,
    into: Slots | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[norm] -> linear -> [clip] -> [q and k norms] -> [rotate] -> [write k and v into pages].

    (..., width) to q (..., heads, head_dim) and k, v (..., kv_heads, head_dim). turn: cos and sin, (..., dim / 2).
    into: where k and v of x (tokens, width) are kept; they are then given back as None.
    """
    return heads(linear(x if before is None else norm(x, before), m), a, q_norm, k_norm, turn, into)


def heads(
    y: Tensor,
    a: Attention,
    q_norm: NormLayer | None,
    k_norm: NormLayer | None,
    turn: tuple[Tensor, Tensor] | None,
    into: Slots | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `qkv` does behind its product."""
    if a.clip is not None:
        y = y.clamp(-a.clip, a.clip)
    q, k = _heads(y, 0, a.heads, a, q_norm), _heads(y, a.q_width, a.kv_heads, a, k_norm)
    v = _heads(y, a.q_width + a.kv_width, a.kv_heads, a, None)
    if turn is not None and isinstance(a.position, Rope):
        q, k = (rope(part, *turn, a.position) for part in (q, k))
    if into is None:
        return q, k, v
    write_pages(k, v, into.keys, into.values, into.slots)
    return q, None, None


def _heads(y: Tensor, first: int, heads: int, a: Attention, n: NormLayer | None) -> Tensor:
    """(..., heads, head_dim) from column `first` of y on, normalised; narrow and view cost least for one token."""
    part, shape = y.narrow(-1, first, heads * a.head_dim), (*y.shape[:-1], heads, a.head_dim)
    if n is None:
        return part.view(shape)
    if a.qk_norm_span == "width":
        return norm(part, n).view(shape)
    return norm(part.view(shape), n)


@op_by_rows
def project(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> Tensor:
    """outer(residual + inner(linear x) * layer_scale * scale), each of them optional: the regions `out` and `down`."""
    return settle(linear(x, m), residual, inner, outer, scale, layer_scale)


@op_by_rows
def project_normed(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
    then: NormLayer,
) -> tuple[Tensor, Tensor | None]:
    """`project`, and `then` of it, with which the next sublayer begins, if that costs no pass of its own, else None."""
    return project(x, m, residual, inner, outer, scale, layer_scale), None


@op_by_rows
def up(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> Tensor:
    """[norm] -> linear -> activation, gated or not: (..., width) to (..., mlp.width)."""
    y = linear(x if before is None else norm(x, before), m)
    return gated(y, mlp.act) if mlp.gated else act(y, mlp.act)


@op_by_rows
def head(x: Tensor, before: NormLayer | None, m: Matrix, h: Head) -> Tensor:
    """[norm] -> linear: (..., width) to logits (..., vocabulary), scaled and soft-capped as the head says."""
    x = x if before is None else norm(x, before)
    y = linear(x if h.scale == 1.0 else x * h.scale, m)
    return y if h.softcap is None else h.softcap * torch.tanh(y / h.softcap)
