"""The plan of a model: what its user names, what transformers declares, or what a trace finds, each only if it is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from hasten.inject.linears import traced
from hasten.inject.linears.choice import Refused, refusal, settle
from hasten.inject.linears.declared import declared
from hasten.inject.linears.draft import Draft
from hasten.inject.linears.named import named
from hasten.inject.linears.plan import Plan
from hasten.inject.linears.probes import Probe, probes
from hasten.inject.linears.rehearsal import Seen, run, see

Names = Mapping[type[nn.Module], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Found:
    """A plan that a rehearsal has found exact, what the whole model gives for the probes, and what there is to say."""

    plan: Plan
    seen: list[Seen]
    notes: tuple[str, ...]


def find(model: nn.Module, names: Names | None, size: int) -> Found:
    """The plan by which `model`, in eval, is divided among `size` ranks; UnsupportedModel if none is exact."""
    tried = probes(model, lambda probe: run(model, probe))
    make = _maker(model, names)
    if make is None:
        return _traced(model, size, tried)
    paths = [s.path for s in make(size).plan().seams]
    seen = [see(model, probe, paths) for probe in tried]
    try:
        return Found(settle(make(size), seen), seen, ())
    except Refused as error:
        raise refusal(error.why, make, size, seen) from None


def _maker(model: nn.Module, names: Names | None) -> Callable[[int], Draft] | None:
    """Who says how the model is divided among so many ranks; None: nobody does."""
    if names:
        return lambda size: named(model, names, size)
    if declared(model, 1) is None:
        return None
    return lambda size: declared(model, size) or Draft(model, "", size)


def _traced(model: nn.Module, size: int, tried: list[Probe]) -> Found:
    pairs = traced.trace(model, tried[0])
    seen = [see(model, probe, [*pairs]) for probe in tried]
    try:
        plan, dropped = traced.exact(model, pairs, size, seen)
    except Refused as error:
        raise refusal(error.why, lambda n: traced.draft(model, pairs, n), size, seen) from None
    return Found(plan, seen, tuple(f"{path} stays whole: {why}" for path, why in dropped.items()))
