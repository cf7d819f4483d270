"""One block: attention, perhaps attention over an encoder's output, then the mlp or the experts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hasten import ops
from hasten.model.context import Context
from hasten.model.layer import Around, CrossAttention, Experts, Feed, Layer, SelfAttention
from hasten.ops import Matrix, NormLayer
from hasten.ops.table import forced
from hasten.parallel import Group
from hasten.spec import Rope


def block(layer: Layer, i: int, x: Tensor, ctx: Context, rows: Tensor | None = None) -> Tensor:
    """Block `i` of a tower on x, (..., width), whose leading axes the context knows.

    rows, int64 (rows,): which of x (tokens, width) to give back. Of the others there are then keys and values alone.
    """
    return block_between(layer, i, x, None, ctx, None, rows)[0]


def block_between(
    layer: Layer,
    i: int,
    x: Tensor,
    normed: Tensor | None,
    ctx: Context,
    then: NormLayer | None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`block`, given its first norm of x where that is there, and `then` of its answer where it costs nothing."""
    shared = x if layer.shared_norm is None else ops.norm(x, layer.shared_norm) if normed is None else normed
    m, mlp = layer.attention, layer.mlp
    over, attended = m.around.over, _attended(m, i, shared, ctx, None if layer.shared_norm else normed)
    if rows is not None:
        attended, x, shared = (t.index_select(0, rows) for t in (attended, x, shared))
    if layer.parallel and layer.cross is None and over is not None:
        return _at_once(layer, over, attended, shared, x), None
    follows = layer.cross is None and not layer.parallel and isinstance(mlp, Feed)
    y, z = _project(attended, m.out, x, m.around, mlp.around.before if follows else None)
    if layer.cross is not None:
        y = _cross(layer.cross, i, y, ctx)
    if not isinstance(mlp, Feed):
        return _settle(_routed(mlp, shared if layer.parallel else y), y, mlp.around), None
    before = mlp.around.before if z is None else None
    z = shared if layer.parallel else y if z is None else z
    return _project(ops.up(z, before, mlp.up, mlp.spec), mlp.down, y, mlp.around, then)


def first_norm(layer: Layer) -> NormLayer | None:
    """What a block takes of its input before it multiplies it."""
    return layer.attention.around.before if layer.shared_norm is None else layer.shared_norm


def _at_once(layer: Layer, over: Group, attended: Tensor, z: Tensor, x: Tensor) -> Tensor:
    """Both sublayers of a parallel block with one exchange: x + the sum over the group of what either gives."""
    m, mlp = layer.attention, layer.mlp
    y = ops.linear(attended, m.out)
    if isinstance(mlp, Feed):
        z = ops.linear(ops.up(z, mlp.around.before, mlp.up, mlp.spec), mlp.down)
    else:
        z = _routed(mlp, z)
    for_attention, for_mlp = m.around.layer_scale, mlp.around.layer_scale
    y = y if for_attention is None else y * for_attention
    y = y + (z if for_mlp is None else z * for_mlp)
    return ops.settle_over(y, x, None, None, m.around.scale, None, over)


def _attended(m: SelfAttention, i: int, x: Tensor, ctx: Context, normed: Tensor | None) -> Tensor:
    """normed: the norm of x, where it is there."""
    a = m.spec
    turn = ctx.turn(a.position) if isinstance(a.position, Rope) else None
    if m.q_norm is not None and a.qk_norm_span == "width" and m.around.over is not None:
        q, k, v = _normed_over(m, m.around.over, x, turn, ctx.slots(i))
    else:
        y, before = (x, m.around.before) if normed is None else (normed, None)
        q, k, v = ops.qkv(y, before, m.qkv, a, m.q_norm, m.k_norm, turn, ctx.slots(i))
    return ctx.attend(i, a, q, k, v, m.sinks).flatten(-2)


def _normed_over(
    m: SelfAttention, over: Group, x: Tensor, turn: tuple[Tensor, Tensor] | None, into: ops.Slots | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`ops.qkv` with norms over all queries and all keys, of which every rank has some."""
    a = m.spec
    assert m.q_norm is not None and m.k_norm is not None, "both are there or none"
    y = ops.linear(x if m.around.before is None else ops.norm(x, m.around.before), m.qkv)
    y = y if a.clip is None else y.clamp(-a.clip, a.clip)
    q, k, v = y.split((a.q_width, a.kv_width, a.kv_width), -1)
    q, k = ops.norms_over(((q, m.q_norm), (k, m.k_norm)), over)
    return ops.heads(torch.cat((q, k, v), -1), replace(a, clip=None), None, None, turn, into)


def _cross(m: CrossAttention, i: int, x: Tensor, ctx: Context) -> Tensor:
    d = m.spec.head_dim
    y = x if m.around.before is None else ops.norm(x, m.around.before)
    q = ops.linear(y, m.q).unflatten(-1, (-1, d))

    def keys_and_values(memory: Tensor) -> tuple[Tensor, Tensor]:
        k, v = ops.linear(memory, m.kv).unflatten(-1, (2, -1, d)).unbind(-3)
        return k, v

    return _project(ctx.attend_memory(i, m.spec, q, keys_and_values).flatten(-2), m.out, x, m.around, None)[0]


def _routed(m: Experts, x: Tensor) -> Tensor:
    y = x if m.around.before is None else ops.norm(x, m.around.before)
    flat = y.flatten(0, -2)  # (tokens, width)
    shares, which = ops.route(flat, m.router, m.spec)
    z = ops.experts(flat, shares, ops.held(which, m.spec), m.up, m.down, m.spec)
    if m.spec.shared is not None and m.shared is not None:
        up, down = m.shared
        s = ops.linear(ops.up(flat, None, up, m.spec.shared), down)
        z = z + (s if m.shared_gate is None else s * ops.linear(flat, m.shared_gate).sigmoid())
    return z.view_as(x)


def _project(x: Tensor, m: Matrix, residual: Tensor, a: Around, then: NormLayer | None) -> tuple[Tensor, Tensor | None]:
    if a.over is not None:
        return _settle(ops.linear(x, m), residual, a), None
    if then is None or forced() is not None:  # a backend that is asked for has `project`
        return ops.project(x, m, residual, a.inner, a.outer, a.scale, a.layer_scale), None
    return ops.project_normed(x, m, residual, a.inner, a.outer, a.scale, a.layer_scale, then)


def _settle(y: Tensor, residual: Tensor, a: Around) -> Tensor:
    if a.over is not None:
        return ops.settle_over(y, residual, a.inner, a.outer, a.scale, a.layer_scale, a.over)
    return ops.settle(y, residual, a.inner, a.outer, a.scale, a.layer_scale)
