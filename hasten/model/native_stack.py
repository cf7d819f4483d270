"""A few new tokens over pages through all blocks in one call of the compiled kernels: no Python lies between them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hasten.model.context import Context
from hasten.model.layer import Feed, Layer
from hasten.model.stack import Stack, stack
from hasten.ops import Matrix, NormLayer
from hasten.ops.cpu import library
from hasten.ops.cpu.library import Library, load
from hasten.ops.cpu.native import ACTS, MOST, NORMS, NUMBERS, address, few, threads, vectors
from hasten.ops.cpu.native_pages import MOST_DIM, whole
from hasten.spec import Alibi, Attention, Rope


class Plan:
    """Layers as the library reads them, for as long as their tensors lie where they lay."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        attentions = [layer.attention.spec for layer in layers]
        self.kinds = list(dict.fromkeys(attentions))
        self.which = [self.kinds.index(a) for a in attentions]  # of the kinds, by layer
        self._tensors: list[Tensor] = []
        self.array = (library.Layer * len(layers))(*map(self._layer, layers))
        self._addresses = self._look()

    @property
    def holds(self) -> bool:
        return self._look() == self._addresses

    @property
    def tracked(self) -> bool:
        """Whether somebody wants gradients of the weights."""
        return any(t.requires_grad for t in self._tensors)

    def _look(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))

    def _keep(self, t: Tensor | None) -> int | None:
        if t is not None:
            self._tensors.append(t)
        return address(t)

    def _layer(self, layer: Layer) -> library.Layer:
        m, feed = layer.attention, layer.mlp
        assert isinstance(feed, Feed), "serves() has seen to it"
        a, p, shared = m.spec, m.spec.position, layer.shared_norm
        return library.Layer(
            **{n: self._linear(w) for n, w in (("qkv", m.qkv), ("out", m.out), ("up", feed.up), ("down", feed.down))},
            before_attention=self._norm(shared or m.around.before),
            behind_attention=self._norm(m.around.outer),
            before_mlp=self._norm(shared or feed.around.before),
            behind_mlp=self._norm(feed.around.outer),
            sinks=self._keep(m.sinks),
            **dict(heads=a.heads, kv_heads=a.kv_heads, dim=a.head_dim, window=a.window or 0),
            **(dict(turned=p.dim, neighbours=p.pairing == "neighbours") if isinstance(p, Rope) else {}),
            **dict(act=ACTS[feed.spec.act], gated=feed.spec.gated, parallel=layer.parallel),
            **dict(scale=a.scale, softcap=a.softcap or 0.0, residual=layer.spec.residual),
        )

    def _linear(self, m: Matrix) -> library.Linear:
        rows, columns = m.weight.shape
        return library.Linear(self._keep(m.weight), self._keep(m.bias), rows, columns, m.weight.stride(0))

    def _norm(self, n: NormLayer | None) -> library.Norm:
        if n is None:
            return library.Norm()
        return library.Norm(self._keep(n.weight), self._keep(n.bias), NORMS[n.spec.kind], n.spec.eps, n.spec.offset)


_plans: WeakKeyDictionary[Stack, dict[torch.dtype, Plan | None]] = WeakKeyDictionary()


def plan(s: Stack, x: Tensor) -> Plan | None:
    """The stack's plan for x's dtype, if the library serves all of its layers."""
    plans = _plans.setdefault(s, {})
    made = plans.get(x.dtype)
    if x.dtype not in plans or (made is not None and not made.holds):
        with torch.no_grad():  # steps() asks who wants a gradient
            served = len(s.layers) > 0 and all(serves(layer, x) for layer in s.layers)
        made = plans[x.dtype] = Plan(s.layers) if served else None
    return made


def serves(layer: Layer, x: Tensor) -> bool:
    """Whether the library has all that the layer does, in x's dtype."""
    m, feed = layer.attention, layer.mlp
    a = m.spec
    if layer.cross is not None or not isinstance(feed, Feed) or feed.spec.act not in ACTS:
        return False
    if m.q_norm is not None or m.k_norm is not None or a.clip is not None or not a.causal or a.head_dim > MOST_DIM:
        return False
    if not (a.position is None or isinstance(a.position, Rope | Alibi)):
        return False
    arounds = m.around, feed.around
    if any(n.inner is not None or n.layer_scale is not None or n.over is not None for n in arounds):
        return False
    norms = [layer.shared_norm, *(n for around in arounds for n in (around.before, around.outer))]
    matrices = m.qkv, m.out, feed.up, feed.down
    sinks = m.sinks is None or (m.sinks.dtype == x.dtype and m.sinks.is_contiguous())
    return sinks and all(vectors(n, x) for n in norms) and all(few(x, matrix) for matrix in matrices)


def steps(x: Tensor, s: Stack, ctx: Context, rows: Tensor | None = None) -> bool:
    """Whether x is a few tokens over pages, all layers are served, and nobody wants a gradient."""
    if x.dim() != 2 or not 0 < len(x) <= MOST.get(x.dtype, 0):
        return False
    into = ctx.slots(0)
    if into is None or into.keys.dtype != x.dtype or not into.keys.is_contiguous():
        return False
    p = plan(s, x)
    if p is None or (torch.is_grad_enabled() and (x.requires_grad or p.tracked)):
        return False
    return all(ctx.reach(a) is not None for a in p.kinds)


def run(native: Library, x: Tensor, s: Stack, ctx: Context) -> Tensor:
    """`stack` by the library."""
    p, into, reach = _plans[s][x.dtype], ctx.slots(0), ctx.reach(s.layers[0].attention.spec)
    assert p is not None and into is not None and reach is not None, "steps() has seen to it"
    slots, tables, lengths = whole(into.slots), whole(reach.tables), whole(reach.lengths)
    starts = None if reach.starts is None else whole(reach.starts)
    shared = [_shared(a, ctx) for a in p.kinds]
    places = _places(p, ctx, [tuple(address(t) or 0 for t in given) for given in shared])
    y = x.clone(memory_format=torch.contiguous_format)
    failed = native.stack(
        *(native.level, threads(), NUMBERS[x.dtype], len(p.which), p.array, places.buffer_info()[0]),
        *(len(x), y.data_ptr(), slots.data_ptr(), into.keys.shape[1]),
        *(len(lengths), tables.data_ptr(), tables.shape[1], address(starts), lengths.data_ptr()),
    )
    if failed:
        raise MemoryError(f"no memory for {tuple(x.shape)} on their way through {len(p.which)} blocks")
    return y


def _shared(a: Attention, ctx: Context) -> tuple[Tensor | None, ...]:
    """cos, sin and slopes, as float32 without gaps, for all layers that attend in the same way."""
    turn = ctx.turn(a.position) if isinstance(a.position, Rope) else (None, None)
    reach = ctx.reach(a)
    given = *turn, None if reach is None else reach.slopes
    return tuple(None if t is None else t.float().contiguous() for t in given)


def _places(p: Plan, ctx: Context, shared: list[tuple[int, ...]]) -> array[int]:
    """Each layer's addresses in this call, as `library.PLACE` names them."""
    flat = array("q")
    for i, kind in enumerate(p.which):
        into = ctx.slots(i)
        assert into is not None, "steps() has seen to it"
        flat.extend((into.keys.data_ptr(), into.values.data_ptr(), *shared[kind]))
    return flat


if isinstance(found := load(), Library):

    @stack.register("native", devices="cpu", accepts=steps)
    def _(x: Tensor, s: Stack, ctx: Context, rows: Tensor | None = None) -> Tensor:
        assert isinstance(found, Library)
        y = run(found, x, s, ctx)
        return y if rows is None else y.index_select(0, rows)
