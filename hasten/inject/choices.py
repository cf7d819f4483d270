"""Which implementations of the ops a call of so many tokens takes on this device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hasten import ops
from hasten.model import Transformer
from hasten.model.layer import Around, Experts, Layer
from hasten.spec import Alibi, Rope, Tokens

PAGE = 16  # tokens
Call = tuple[ops.Op, tuple[Any, ...]]


def choices(t: Transformer, rows: int, paged: bool, invariant: bool = False) -> tuple[str, ...]:
    """`op implementation` for `rows` tokens through the first block, and the head; paged: as native generation calls,
    invariant: where its rows must not depend on each other.

    A call of several tokens is of one sequence, all of them new.
    """
    like = next(iter(t.weights.values()))
    x = torch.zeros(rows, t.tower.width, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        calls = [*_parts(t.layers[0], x), *_attention(t.layers[0], x, paged), *_mlp(t.layers[0], x)]
        free = ops.invariant if invariant else nullcontext
        with ops.use(t.backends[0]) if 0 in t.backends else free():
            found = [_chosen(*call) for call in calls]
        with free():
            return tuple(dict.fromkeys((*found, *(_chosen(*call) for call in _head(t, x)))))


def _parts(layer: Layer, x: Tensor) -> list[Call]:
    """What the references of regions are made of."""
    around = layer.attention.around
    n = around.before or around.outer or layer.shared_norm
    return [(ops.linear, (x, layer.attention.qkv)), *([] if n is None else [(ops.norm, (x, n))])]


def _attention(layer: Layer, x: Tensor, paged: bool) -> list[Call]:
    m, a, rows = layer.attention, layer.attention.spec, len(x)
    r = a.position
    turn = (x.new_zeros(rows, r.dim // 2, dtype=torch.float32),) * 2 if isinstance(r, Rope) else None
    q = x.new_zeros(rows, a.heads, a.head_dim)
    slopes = x.new_zeros(a.heads, dtype=torch.float32) if isinstance(r, Alibi) else None
    if paged:
        pages = -(-rows // PAGE)
        keys = x.new_zeros(pages, PAGE, a.kv_heads, a.head_dim)
        where = torch.arange(rows, device=x.device)
        starts = None if rows == 1 else torch.tensor([0, rows], device=x.device)
        tables, lengths = torch.arange(pages, device=x.device)[None], torch.tensor([rows], device=x.device)
        into = ops.Slots(keys, keys.clone(), where)
        attend: Call = (ops.attend_pages, (q, keys, into.values, tables, starts, lengths, a, slopes, m.sinks))
    else:
        into, k = None, q[None, :, : a.kv_heads]
        attend = (ops.attend, (q[None], k, k, a, None, None, m.sinks))
    given = (x, m.around.before, m.qkv, a, m.q_norm, m.k_norm, turn, into)
    return [(ops.qkv, given), attend, *_ending(q.flatten(1), m.out, x, m.around)]


def _mlp(layer: Layer, x: Tensor) -> list[Call]:
    m = layer.mlp
    if isinstance(m, Experts):
        shares = x.new_zeros(len(x), m.spec.top_k)
        return [(ops.route, (x, m.router, m.spec)), (ops.experts, (x, shares, shares.long(), m.up, m.down, m.spec))]
    y = x.new_zeros(len(x), m.spec.width)
    return [(ops.up, (x, m.around.before, m.up, m.spec)), *_ending(y, m.down, x, m.around)]


def _ending(y: Tensor, m: ops.Matrix, residual: Tensor, a: Around) -> list[Call]:
    """A sublayer's last product and what follows it: one region, or where ranks divide it with an exchange between."""
    behind = (residual, a.inner, a.outer, a.scale, a.layer_scale)
    if a.over is None:
        return [(ops.project, (y, m, *behind))]
    return [(ops.linear, (y, m)), (ops.settle_over, (residual, *behind, a.over))]


def _head(t: Transformer, x: Tensor) -> list[Call]:
    h, e = t.tower.head, t.tower.embed
    if not t.place.last or h is None or not isinstance(e, Tokens) or e.projection is not None:
        return []
    matrix = ops.Matrix(t.weights["tokens" if h.tied else "head.weight"], t.weights.get("head.bias"))
    return [(ops.head, (x, t.final_norm, matrix, h))]


def _chosen(op: ops.Op, arguments: tuple[Any, ...]) -> str:
    return f"{op.name} {next(backend for backend, why in op.explain(*arguments) if why == 'chosen')}"
