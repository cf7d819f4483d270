"""The plan of a model: what its user names, transformers declares, or a trace finds, each only if it is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from hasten.errors import UnsupportedModel
from hasten.inject.linears import traced
from hasten.inject.linears.choice import Refused, refusal, settle
from hasten.inject.linears.declared import SOURCE, declared
from hasten.inject.linears.draft import Draft
from hasten.inject.linears.named import named
from hasten.inject.linears.plan import Plan
from hasten.inject.linears.probes import Probe, probes
from hasten.inject.linears.rehearsal import see

Names = Mapping[type[nn.Module], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Found:
    """A plan that a rehearsal has found exact, the probes that it was tried on, and what there is to say."""

    plan: Plan
    probes: tuple[Probe, ...]
    notes: tuple[str, ...]


def find(model: nn.Module, names: Names, size: int, instead: str = "") -> Found:
    """The plan by which `model` is divided among `size` ranks; UnsupportedModel if none is exact.

    names: of the linears that are summed behind, by layer class, where the user has said. instead: why no family
    describes the model, if that is why it is divided so. The model is left as it was.
    """
    trained = [m for m in model.modules() if m.training]
    model.eval()
    try:
        found = _found(model, names, size)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}. {instead}" if instead else str(error)) from None
    finally:
        for m in trained:
            m.training = True
    return replace(found, notes=(f"only linears are divided: {instead}", *found.notes)) if instead else found


def _found(model: nn.Module, names: Names, size: int) -> Found:
    tried = probes(model)
    make = _maker(model, names)
    if make is None:
        return _traced(model, size, tried)
    try:
        return Found(_settled(make(size), tried), tried, ())
    except Refused as error:
        name, source = type(model).__name__, make(size).source
        raise refusal(name, source, size, error.why, lambda n: _settled(make(n), tried)) from None


def _settled(draft: Draft, tried: tuple[Probe, ...]) -> Plan:
    paths = [s.path for s in draft.plan().seams]
    return settle(draft, [see(draft.model, probe, paths) for probe in tried])


def _maker(model: nn.Module, names: Names) -> Callable[[int], Draft] | None:
    """Who says how the model is divided among so many ranks; None: nobody does."""
    if names:
        return lambda size: named(model, names, size)
    if declared(model, 1) is None:
        return None
    return lambda size: declared(model, size) or Draft(model, SOURCE, size)


def _traced(model: nn.Module, size: int, tried: tuple[Probe, ...]) -> Found:
    pairs = traced.trace(model, tried[0])
    seen = [see(model, probe, [*pairs]) for probe in tried]
    try:
        plan, dropped = traced.exact(model, pairs, size, seen)
    except Refused as error:
        name, exact = type(model).__name__, traced.exact
        raise refusal(name, traced.SOURCE, size, error.why, lambda n: exact(model, pairs, n, seen)) from None
    return Found(plan, tried, tuple(f"{path} stays whole: {why}" for path, why in dropped.items()))
