"""One block: attention, perhaps attention over an encoder's output, then the mlp or the experts."""

from __future__ import annotations

from torch import Tensor

from hasten import ops
from hasten.model.context import Context
from hasten.model.layer import Around, CrossAttention, Experts, Feed, Layer, SelfAttention
from hasten.ops import Matrix
from hasten.spec import Rope


def block(layer: Layer, i: int, x: Tensor, ctx: Context) -> Tensor:
    """Block `i` of a tower on x, (..., width), whose leading axes the context knows."""
    shared = x if layer.shared_norm is None else ops.norm(x, layer.shared_norm)
    y = _attention(layer.attention, i, shared, x, ctx)
    if layer.cross is not None:
        y = _cross(layer.cross, i, y, ctx)
    feed = _feed if isinstance(layer.mlp, Feed) else _experts
    return feed(layer.mlp, shared if layer.parallel else y, y)  # pyright: ignore[reportArgumentType]


def _attention(m: SelfAttention, i: int, x: Tensor, residual: Tensor, ctx: Context) -> Tensor:
    turn = ctx.turn(m.spec.position) if isinstance(m.spec.position, Rope) else None
    q, k, v = ops.qkv(x, m.around.before, m.qkv, m.spec, m.q_norm, m.k_norm, turn, ctx.slots(i))
    return _project(ctx.attend(i, m.spec, q, k, v, m.sinks).flatten(-2), m.out, residual, m.around)


def _cross(m: CrossAttention, i: int, x: Tensor, ctx: Context) -> Tensor:
    d = m.spec.head_dim
    y = x if m.around.before is None else ops.norm(x, m.around.before)
    q = ops.linear(y, m.q).unflatten(-1, (-1, d))

    def keys_and_values(memory: Tensor) -> tuple[Tensor, Tensor]:
        k, v = ops.linear(memory, m.kv).unflatten(-1, (2, -1, d)).unbind(-3)
        return k, v

    return _project(ctx.attend_memory(i, m.spec, q, keys_and_values).flatten(-2), m.out, x, m.around)


def _feed(m: Feed, x: Tensor, residual: Tensor) -> Tensor:
    return _project(ops.up(x, m.around.before, m.up, m.spec), m.down, residual, m.around)


def _experts(m: Experts, x: Tensor, residual: Tensor) -> Tensor:
    y = x if m.around.before is None else ops.norm(x, m.around.before)
    flat = y.flatten(0, -2)  # (tokens, width)
    shares, which = ops.route(flat, m.router, m.spec)
    z = ops.experts(flat, shares, which, m.up, m.down, m.spec)
    if m.spec.shared is not None and m.shared is not None:
        up, down = m.shared
        s = ops.linear(ops.up(flat, None, up, m.spec.shared), down)
        z = z + (s if m.shared_gate is None else s * ops.linear(flat, m.shared_gate).sigmoid())
    a = m.around
    return ops.settle(z.view_as(x), residual, a.inner, a.outer, a.scale, a.layer_scale)


def _project(x: Tensor, m: Matrix, residual: Tensor, a: Around) -> Tensor:
    return ops.project(x, m, residual, a.inner, a.outer, a.scale, a.layer_scale)
