"""The canonical parameters of a tower: names, shapes and roles.

Canonical matrices are (out, in). Fused ones hold their parts as consecutive rows: [q | k | v], [k | v], [gate | up].
How a parameter is split among devices follows from its role alone, so no architecture ever mentions it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hasten.spec import Attention, Block, Buckets, Frames, Mlp, Moe, Norm, Patches, Tokens, Tower

Role = Literal["replicated", "rows", "columns", "vocab", "heads", "heads_table", "expert_rows", "expert_columns"]


@dataclass(frozen=True, slots=True)
class Param:
    """One canonical tensor. `parts` are row counts of the logical tensors stacked in it, `stack` a leading axis."""

    name: str
    slot: str
    kind: Literal["weight", "bias"]
    parts: tuple[int, ...]
    columns: tuple[int, ...]
    role: Role
    unit: int = 1  # rows (of "columns": columns) that stay together: a head
    block: int | None = None
    absent: tuple[bool, ...] = ()  # parts with no source, which are zero
    stack: int = 0  # experts

    @property
    def shape(self) -> tuple[int, ...]:
        return (*((self.stack,) if self.stack else ()), sum(self.parts), *self.columns)


def params(t: Tower) -> Iterator[Param]:
    """Every parameter of the tower, embedding first, head last."""
    yield from _embedding(t)
    for i, b in enumerate(t.blocks):
        yield from _block(b, t.width, i)
    first = t.blocks[0].attention
    if isinstance(first.position, Buckets):
        yield Param("buckets", "buckets", "weight", (first.position.count,), (first.heads,), "heads_table")
    yield from _norm("final_norm", t.final_norm, t.width)
    if isinstance(t.embed, Tokens) and t.head:
        if not t.head.tied:
            yield Param("head.weight", "head", "weight", (t.embed.vocab,), (t.embed.width,), "vocab")
        if t.head.bias:
            yield Param("head.bias", "head", "bias", (t.embed.vocab,), (), "vocab")


def _embedding(t: Tower) -> Iterator[Param]:
    match t.embed:
        case Tokens() as e:
            yield Param("tokens", "tokens", "weight", (e.vocab,), (e.width,), "vocab")
            late = e.projection is None or e.projection.after == "norm"
            width = e.width if late else t.width  # of everything added to the token's vector
            if e.positions:
                yield Param("positions", "positions", "weight", (e.positions,), (width,), "replicated")
            if e.types:
                yield Param("types", "types", "weight", (e.types,), (width,), "replicated")
            if e.projection:
                yield from _linear("project_in", t.width, e.width, e.projection.bias)
                if e.projection.back:
                    yield from _linear("project_out", e.width, t.width, False)
            yield from _norm("embed_norm", e.norm, width)
        case Patches():
            return
        case Frames() as e:
            for name, channels in (("conv1", e.mels), ("conv2", t.width)):
                yield Param(f"{name}.weight", name, "weight", (t.width,), (channels, 3), "replicated")
                yield Param(f"{name}.bias", name, "bias", (t.width,), (), "replicated")
            yield Param("positions", "positions", "weight", (e.positions,), (t.width,), "replicated")
            yield from _norm("embed_norm", e.norm, t.width)


def _linear(slot: str, rows: int, columns: int, bias: bool) -> Iterator[Param]:
    yield Param(f"{slot}.weight", slot, "weight", (rows,), (columns,), "replicated")
    if bias:
        yield Param(f"{slot}.bias", slot, "bias", (rows,), (), "replicated")


def _norm(slot: str, n: Norm | None, width: int, i: int | None = None) -> Iterator[Param]:
    name = slot if i is None else f"blocks.{i}.{slot}"
    yield from _normed(Param(name, slot, "weight", (width,), (), "replicated", block=i), n)


def _normed(p: Param, n: Norm | None) -> Iterator[Param]:
    """A norm's weight and bias, which are like `p` but for their names."""
    if n is not None:
        yield replace(p, name=f"{p.name}.weight")
        if n.bias:
            yield replace(p, name=f"{p.name}.bias", kind="bias")


def _block(b: Block, width: int, i: int) -> Iterator[Param]:
    yield from _norm("attn_norm", b.norm, width, i)
    yield from _attention(b.attention, width, i)
    if b.order == "sandwich":
        yield from _norm("attn_out_norm", b.norm, width, i)
    if b.cross:
        yield from _norm("cross_norm", b.norm, width, i)
        yield from _cross(b.cross, width, i)
    if b.order != "parallel-shared":
        yield from _norm("mlp_norm", b.norm, width, i)
    yield from _moe(b.mlp, width, i) if isinstance(b.mlp, Moe) else _mlp(b.mlp, width, i)
    if b.order == "sandwich":
        yield from _norm("mlp_out_norm", b.norm, width, i)
    if b.layer_scale:
        for slot in ("attn_scale", "mlp_scale"):
            yield Param(f"blocks.{i}.{slot}", slot, "weight", (width,), (), "replicated", block=i)


def _fused(slot: str, letters: str, parts: tuple[int, ...], a: Attention, width: int, i: int) -> Iterator[Param]:
    name = f"blocks.{i}.{slot}"
    yield Param(f"{name}.weight", slot, "weight", parts, (width,), "rows", a.head_dim, i)
    if set(letters) & set(a.bias):
        absent = tuple(c not in a.bias for c in letters)
        yield Param(f"{name}.bias", slot, "bias", parts, (), "rows", a.head_dim, i, absent)


def _attention(a: Attention, width: int, i: int) -> Iterator[Param]:
    yield from _fused("qkv", "qkv", (a.q_width, a.kv_width, a.kv_width), a, width, i)
    for slot, heads, part in (("q_norm", a.heads, a.q_width), ("k_norm", a.kv_heads, a.kv_width)):
        name = f"blocks.{i}.{slot}"
        match a.qk_norm_span:
            case "head":
                p = Param(name, slot, "weight", (a.head_dim,), (), "replicated", block=i)
            case "heads":
                p = Param(name, slot, "weight", (1,) * heads, (a.head_dim,), "heads", block=i)
            case "width":
                p = Param(name, slot, "weight", (part,), (), "heads", a.head_dim, i)
        yield from _normed(p, a.qk_norm)
    if a.sinks:
        yield Param(f"blocks.{i}.sinks", "sinks", "weight", (a.heads,), (), "heads", 1, i)
    yield from _out("out", a, width, i)


def _cross(a: Attention, width: int, i: int) -> Iterator[Param]:
    yield from _fused("cross_q", "q", (a.q_width,), a, width, i)
    yield from _fused("cross_kv", "kv", (a.kv_width, a.kv_width), a, width, i)
    yield from _out("cross_out", a, width, i)


def _out(slot: str, a: Attention, width: int, i: int) -> Iterator[Param]:
    yield Param(f"blocks.{i}.{slot}.weight", slot, "weight", (width,), (a.q_width,), "columns", a.head_dim, i)
    if "o" in a.bias:
        yield Param(f"blocks.{i}.{slot}.bias", slot, "bias", (width,), (), "replicated", 1, i)


def _mlp(m: Mlp, width: int, i: int, prefix: str = "") -> Iterator[Param]:
    up, down, parts = f"{prefix}up", f"{prefix}down", (m.width,) * (2 if m.gated else 1)
    yield Param(f"blocks.{i}.{up}.weight", up, "weight", parts, (width,), "rows", 1, i)
    yield Param(f"blocks.{i}.{down}.weight", down, "weight", (width,), (m.width,), "columns", 1, i)
    if m.bias:
        yield Param(f"blocks.{i}.{up}.bias", up, "bias", parts, (), "rows", 1, i)
        yield Param(f"blocks.{i}.{down}.bias", down, "bias", (width,), (), "replicated", 1, i)


def _moe(m: Moe, width: int, i: int) -> Iterator[Param]:
    b, e, x = f"blocks.{i}.", m.here, m.expert
    parts = (x.width,) * (2 if x.gated else 1)
    yield Param(f"{b}router.weight", "router", "weight", (m.experts,), (width,), "replicated", 1, i)
    if m.router_bias:
        yield Param(f"{b}router.bias", "router", "bias", (m.experts,), (), "replicated", 1, i)
    yield Param(f"{b}up.weight", "expert_up", "weight", parts, (width,), "expert_rows", 1, i, stack=e)
    yield Param(f"{b}down.weight", "expert_down", "weight", (width,), (x.width,), "expert_columns", 1, i, stack=e)
    if x.bias:
        yield Param(f"{b}up.bias", "expert_up", "bias", parts, (), "expert_rows", 1, i, stack=e)
        yield Param(f"{b}down.bias", "expert_down", "bias", (width,), (), "replicated", 1, i, stack=e)
    if m.shared:
        yield from _mlp(m.shared, width, i, "shared_")
        if m.shared_gate:
            yield Param(f"{b}shared_gate.weight", "shared_gate", "weight", (1,), (width,), "replicated", 1, i)
