"""Every decision that init_inference took, and what calls made of it, as a value that prints as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.inject.backbone import Backbone
from hasten.inject.choices import choices

if TYPE_CHECKING:
    from hasten.inject.engine import InferenceEngine
    from hasten.inject.live import LiveGenerate


MANY = 128  # tokens: a short prompt, or a batch of many sequences


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
    one_token: tuple[str, ...]  # `op implementation`
    many_tokens: tuple[str, ...]
    fallbacks: tuple[str, ...]
    calls: int
    detours: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class GenerateReport:
    """How calls of the model's generate() were answered."""

    native: int
    loops: tuple[tuple[str, int], ...]  # why transformers' loop answered, and how often
    decoding: str  # how native decode steps run

    def __str__(self) -> str:
        return f"generate: {self.native} native" + "".join(
            f", {n} by transformers' loop ({why})" for why, n in self.loops
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    model: str
    dtype: str
    device: str
    backbones: tuple[BackboneReport, ...]
    generate: GenerateReport | None  # None: it is transformers' alone
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.dtype} on {self.device}"]
        for b in self.backbones:
            lines += [
                f"{b.path} ({b.type}), a {b.kind}: {b.blocks} blocks ({', '.join(b.orders)}), weights as {b.dialect}",
                f"  weights {b.weight_bytes / 2**20:,.1f} MiB, shared with the model"
                + (f"; {b.emptied} of its parameters are filled on demand" if b.emptied else ""),
                "  one token: " + ", ".join(b.one_token),
                f"  {MANY} tokens: " + ", ".join(b.many_tokens),
                *(f"  fell back: {f}" for f in b.fallbacks),
                f"  calls: {b.calls} fused" + "".join(f", {n} by the model itself ({why})" for why, n in b.detours),
            ]
        if self.generate is not None:
            lines += [str(self.generate), f"  {self.generate.decoding}"]
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
        generate=_generate(engine.generating) if engine.live and engine.generating is not None else None,
        notes=tuple(engine.notes),
    )


def _generate(live: LiveGenerate) -> GenerateReport:
    return GenerateReport(live.served, tuple(live.loops.most_common()), str(live.native))


def _backbone(b: Backbone) -> BackboneReport:
    assert b.loan is not None
    t, paged = b.transformer, b.seam.kind == "decoder" and b.tower.head is not None
    return BackboneReport(
        path=b.path or "the model",
        type=type(b.module).__name__,
        kind=b.seam.kind,
        blocks=len(t.tower.blocks),
        orders=tuple(dict.fromkeys(s.order for s in t.tower.blocks)),
        dialect=b.bindings[0].dialect.name,
        weight_bytes=sum({w.data_ptr(): w.numel() * w.element_size() for w in t.weights.values()}.values()),
        emptied=len(b.loan.emptied),
        one_token=choices(t, 1, paged),
        many_tokens=choices(t, MANY, paged),
        fallbacks=tuple(f"block {i}: {name}" for i, name in sorted(t.backends.items())),
        calls=b.calls,
        detours=tuple(Counter(b.detours).most_common()),
    )
