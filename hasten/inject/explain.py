"""Every decision that init_inference took, and what calls made of it, as a value that prints as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.inject.backbone import Backbone
from hasten.inject.choices import choices
from hasten.inject.linears import Linears, alike
from hasten.inject.linears.matrices import LAYOUTS

if TYPE_CHECKING:
    from hasten.inject.engine import InferenceEngine
    from hasten.inject.live import LiveGenerate


MANY = 128  # tokens: a short prompt, or a batch of many sequences
INVARIANT = (
    "batch-invariant: native generation answers a request with the same bits whatever runs beside it; its price is in "
    "docs/benchmarks.md, and forwards and transformers' loop do not have it"
)


@dataclass(frozen=True, slots=True)
class BackboneReport:
    path: str
    type: str
    kind: str
    blocks: int
    here: range  # the blocks of this rank's stage
    orders: tuple[str, ...]
    dialect: str
    weight_bytes: int
    rank: int
    ranks: int  # that divide its layers
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
    invariant: bool  # what native generation gives a request does not depend on what runs beside it

    def __str__(self) -> str:
        lines = [
            f"generate: {self.native} native"
            + "".join(f", {n} by transformers' loop ({why})" for why, n in self.loops),
            f"  {self.decoding}",
        ]
        if self.invariant:
            lines.append(f"  {INVARIANT}")
            outside = sum(n for _, n in self.loops)
            lines += [f"  {outside} calls were answered by transformers' loop: not batch-invariant"] if outside else []
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class LinearsReport:
    """A model whose linears alone are divided among ranks."""

    source: str
    rank: int
    ranks: int
    cut: tuple[str, ...]  # kinds of parameters of which a rank holds a part; numbers of layers left open
    met: tuple[str, ...]  # kinds of modules behind which ranks exchange, and what
    counts: tuple[str, ...]  # integers that were changed
    weight_bytes: int

    def __str__(self) -> str:
        return "\n".join(
            [
                f"linears only, by {self.source}: {len(self.cut)} kinds of parameters are divided",
                f"  weights {self.weight_bytes / 2**20:,.1f} MiB on rank {self.rank} of {self.ranks}",
                f"  a part of: {', '.join(self.cut)}",
                f"  ranks meet behind: {', '.join(self.met)}",
                *([f"  counts that were changed: {', '.join(self.counts)}"] if self.counts else []),
                "  calls: all by the model's own forward",
            ]
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    model: str
    dtype: str
    device: str
    backbones: tuple[BackboneReport, ...]
    generate: GenerateReport | None  # None: it is transformers' alone
    linears: LinearsReport | None  # None: it is not divided so
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.dtype} on {self.device}"]
        for b in self.backbones:
            lines += [
                f"{b.path} ({b.type}), a {b.kind}: {b.blocks} blocks ({', '.join(b.orders)}), weights as {b.dialect}",
                *([f"  blocks {b.here.start}-{b.here.stop - 1} on this rank"] if len(b.here) < b.blocks else []),
                f"  weights {b.weight_bytes / 2**20:,.1f} MiB"
                + (f" on rank {b.rank} of {b.ranks}" if b.ranks > 1 else "")
                + ", shared with the model"
                + (f"; {b.emptied} of its parameters are filled on demand" if b.emptied else ""),
                "  one token: " + ", ".join(b.one_token),
                f"  {MANY} tokens: " + ", ".join(b.many_tokens),
                *(f"  fell back: {f}" for f in b.fallbacks),
                f"  calls: {b.calls} fused" + "".join(f", {n} by the model itself ({why})" for why, n in b.detours),
            ]
        if self.generate is not None:
            lines.append(str(self.generate))
        if self.linears is not None:
            lines.append(str(self.linears))
        elif not self.backbones:
            lines.append("no backbone is fused: the model serves its calls itself")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def explain(engine: InferenceEngine) -> Explanation:
    """What there is to say about the engine at this moment."""
    first, invariant = next(engine.module.parameters()), engine.options.batch_invariant
    return Explanation(
        model=type(engine.module).__name__,
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        backbones=tuple(_backbone(b, invariant) for b in engine.backbones) if engine.live else (),
        generate=_generate(engine.generating) if engine.live and engine.generating is not None else None,
        linears=_linears(engine.linears) if engine.live and engine.linears is not None else None,
        notes=tuple(engine.notes),
    )


def _linears(linears: Linears) -> LinearsReport:
    plan, group = linears.plan, linears.division.group
    own = {layout.counts for layout in LAYOUTS.values()}
    return LinearsReport(
        source=plan.source,
        rank=group.rank,
        ranks=group.size,
        cut=tuple(dict.fromkeys(alike(c.name) for c in plan.cuts)),
        met=tuple(dict.fromkeys(f"{alike(s.path)} ({s.kind})" for s in plan.seams)),
        counts=tuple(dict.fromkeys(str(n) for n in plan.counts if not any(n.name in names for names in own))),
        weight_bytes=linears.bytes,
    )


def _generate(live: LiveGenerate) -> GenerateReport:
    loops = tuple(live.loops.most_common())
    return GenerateReport(live.served, loops, str(live.native), live.native.invariant)


def _backbone(b: Backbone, invariant: bool) -> BackboneReport:
    assert b.loan is not None
    t, paged = b.transformer, b.seam.kind == "decoder" and b.tower.head is not None
    return BackboneReport(
        path=b.path or "the model",
        type=type(b.module).__name__,
        kind=b.seam.kind,
        blocks=len(b.tower.blocks),
        here=b.here,
        orders=tuple(dict.fromkeys(s.order for s in b.tower.blocks)),
        dialect=b.bindings[0].dialect.name,
        weight_bytes=sum({w.data_ptr(): w.numel() * w.element_size() for w in t.weights.values()}.values()),
        rank=0 if b.division is None else b.division.everyone.rank,
        ranks=1 if b.division is None else b.division.everyone.size,
        emptied=len(b.loan.emptied),
        one_token=choices(t, 1, paged, invariant),
        many_tokens=choices(t, MANY, paged, invariant),
        fallbacks=tuple(f"block {b.here[i]}: {name}" for i, name in sorted(t.backends.items())),
        calls=b.calls,
        detours=tuple(Counter(b.detours).most_common()),
    )
