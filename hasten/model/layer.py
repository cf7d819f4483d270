"""A block's weights beside its description, each norm placed where the block's order puts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hasten.ops import Matrix, NormLayer
from hasten.parallel import Group
from hasten.spec import Attention, Block, Mlp, Moe, Norm, Order

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Around:
    """What surrounds a sublayer f: outer(residual + scale * layer_scale * inner(f(before(x)))).

    over: the group over which f is a sum.
    """

    before: NormLayer | None
    inner: NormLayer | None
    outer: NormLayer | None
    scale: float
    layer_scale: Tensor | None
    over: Group | None


@dataclass(frozen=True, slots=True, eq=False)
class SelfAttention:
    spec: Attention
    qkv: Matrix
    out: Matrix
    q_norm: NormLayer | None
    k_norm: NormLayer | None
    sinks: Tensor | None
    around: Around


@dataclass(frozen=True, slots=True, eq=False)
class CrossAttention:
    spec: Attention
    q: Matrix
    kv: Matrix
    out: Matrix
    around: Around


@dataclass(frozen=True, slots=True, eq=False)
class Feed:
    """A dense mlp."""

    spec: Mlp
    up: Matrix
    down: Matrix
    around: Around


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """A mixture of experts, with the one that every token takes."""

    spec: Moe
    router: Matrix
    up: Matrix
    down: Matrix
    shared: tuple[Matrix, Matrix] | None
    shared_gate: Matrix | None
    around: Around


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    spec: Block
    attention: SelfAttention
    cross: CrossAttention | None
    mlp: Feed | Experts
    shared_norm: NormLayer | None  # both sublayers read shared_norm(x)
    parallel: bool  # the mlp reads the block's input, not the attention's output


# where a sublayer's norms sit: the slot suffix of (before, inner, outer), None where there is none
PLACES: dict[Order, tuple[str | None, str | None, str | None]] = {
    "pre": ("_norm", None, None),
    "post": (None, None, "_norm"),
    "sandwich": ("_norm", "_out_norm", None),
    "reordered": (None, "_norm", None),
    "parallel": ("_norm", None, None),
    "parallel-shared": (None, None, None),
}


def layer(b: Block, w: Weights, i: int, over: Group | None = None) -> Layer:
    """Block `i` of a tower's canonical weights, or of a rank's shares of them."""
    p = f"blocks.{i}."
    a = b.attention
    attention = SelfAttention(
        a,
        _matrix(w, f"{p}qkv"),
        _summand(w, f"{p}out", over),
        _norm(w, f"{p}q_norm", a.qk_norm),
        _norm(w, f"{p}k_norm", a.qk_norm),
        w.get(f"{p}sinks"),
        _around(b, w, p, "attn", over),
    )
    cross = None
    if b.cross:
        q, kv, out = _matrix(w, f"{p}cross_q"), _matrix(w, f"{p}cross_kv"), _summand(w, f"{p}cross_out", over)
        cross = CrossAttention(b.cross, q, kv, out, _around(b, w, p, "cross", over))
    shared = _norm(w, f"{p}attn_norm", b.norm) if b.order == "parallel-shared" else None
    return Layer(b, attention, cross, _mlp(b, w, p, over), shared, b.order.startswith("parallel"))


def _mlp(b: Block, w: Weights, p: str, over: Group | None) -> Feed | Experts:
    up, around = _matrix(w, f"{p}up"), _around(b, w, p, "mlp", over)
    if isinstance(b.mlp, Mlp):
        return Feed(b.mlp, up, _summand(w, f"{p}down", over), around)
    down = _summand(w, f"{p}down", over) if b.mlp.held is None else _matrix(w, f"{p}down")
    shared = (_matrix(w, f"{p}shared_up"), _summand(w, f"{p}shared_down", over)) if b.mlp.shared else None
    gate = _matrix(w, f"{p}shared_gate") if b.mlp.shared_gate else None
    return Experts(b.mlp, _matrix(w, f"{p}router"), up, down, shared, gate, around)


def _around(b: Block, w: Weights, p: str, which: str, over: Group | None) -> Around:
    before, inner, outer = (None if s is None else _norm(w, f"{p}{which}{s}", b.norm) for s in PLACES[b.order])
    return Around(before, inner, outer, b.residual, w.get(f"{p}{which}_scale"), over)


def _matrix(w: Weights, name: str) -> Matrix:
    return Matrix(w[f"{name}.weight"], w.get(f"{name}.bias"))


def _summand(w: Weights, name: str, over: Group | None) -> Matrix:
    """A matrix whose products are summed over the group, in which one rank adds the bias."""
    m = _matrix(w, name)
    return m if over is None or over.rank == 0 else Matrix(m.weight)


def _norm(w: Weights, name: str, n: Norm | None) -> NormLayer | None:
    return None if n is None else NormLayer(n, w[f"{name}.weight"], w.get(f"{name}.bias"))
