"""Every decision that init_inference took, and what calls made of it, as a value that prints as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten import ops
from hasten.inject.backbone import Backbone
from hasten.model.layer import Layer
from hasten.spec import Moe

if TYPE_CHECKING:
    from hasten.inject.engine import InferenceEngine


@dataclass(frozen=True, slots=True)
class BackboneReport:
    path: str
    type: str
    kind: str
    blocks: int
    orders: tuple[str, ...]
    dialect: str
    weight_bytes: int
    emptied: int  # live parameters that are filled only when somebody looks
    backends: tuple[str, ...]  # op: implementation that a one-token call takes
    fallbacks: tuple[str, ...]
    calls: int
    detours: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    model: str
    dtype: str
    device: str
    backbones: tuple[BackboneReport, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.dtype} on {self.device}"]
        for b in self.backbones:
            lines += [
                f"{b.path} ({b.type}), a {b.kind}: {b.blocks} blocks ({', '.join(b.orders)}), weights as {b.dialect}",
                f"  weights {b.weight_bytes / 2**20:,.1f} MiB, shared with the model"
                + (f"; {b.emptied} of its parameters are filled on demand" if b.emptied else ""),
                "  ops: " + ", ".join(b.backends),
                *(f"  fell back: {f}" for f in b.fallbacks),
                f"  calls: {b.calls} fused" + "".join(f", {n} by the model itself ({why})" for why, n in b.detours),
            ]
        if not self.backbones:
            lines.append("no backbone is fused: the model serves its calls itself")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def explain(engine: InferenceEngine) -> Explanation:
    """What there is to say about the engine at this moment."""
    first = next(engine.module.parameters())
    return Explanation(
        model=type(engine.module).__name__,
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        backbones=tuple(map(_backbone, engine.backbones)) if engine.live else (),
        notes=tuple(engine.notes),
    )


def _backbone(b: Backbone) -> BackboneReport:
    assert b.loan is not None
    t = b.transformer
    return BackboneReport(
        path=b.path or "the model",
        type=type(b.module).__name__,
        kind=b.seam.kind,
        blocks=len(t.tower.blocks),
        orders=tuple(dict.fromkeys(s.order for s in t.tower.blocks)),
        dialect=b.bindings[0].dialect.name,
        weight_bytes=sum({w.data_ptr(): w.numel() * w.element_size() for w in t.weights.values()}.values()),
        emptied=len(b.loan.emptied),
        backends=tuple(_backends(t.layers[0], t.tower.width, next(iter(t.weights.values())))),
        fallbacks=tuple(f"block {i}: {name}" for i, name in sorted(t.backends.items())),
        calls=b.calls,
        detours=tuple(Counter(b.detours).most_common()),
    )


def _backends(layer: Layer, width: int, like: Tensor) -> list[str]:
    """`op: backend` for one token through the first block."""
    x = torch.zeros(1, width, dtype=like.dtype, device=like.device)
    a, around = layer.attention, layer.attention.around
    found = {"linear": _chosen(ops.linear, x, a.qkv)}
    n = around.before or around.outer or layer.shared_norm
    if n is not None:
        found["norm"] = _chosen(ops.norm, x, n)
    q = torch.zeros(1, 1, a.spec.heads, a.spec.head_dim, dtype=like.dtype, device=like.device)
    k = q[:, :, : a.spec.kv_heads]
    found["attend"] = _chosen(ops.attend, q, k, k, a.spec, None, None, a.sinks)
    if not isinstance(layer.mlp.spec, Moe):
        found["up"] = _chosen(ops.up, x, layer.mlp.around.before, layer.mlp.up, layer.mlp.spec)
    return [f"{op} {backend}" for op, backend in found.items()]


def _chosen(op: ops.Op, *args: object) -> str:
    return next(backend for backend, why in op.explain(*args) if why == "chosen")  # pyright: ignore[reportArgumentType]
