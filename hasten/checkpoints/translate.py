"""From a checkpoint in a dialect of its own to a model in another: by the canonical parameters that both know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from hasten.checkpoints.names import Names, Read, Target
from hasten.checkpoints.source import Entry
from hasten.errors import WeightError
from hasten.spec import Tower
from hasten.weights import Binding, Dialect, Param, fetch, stored
from hasten.weights.dialect import key

Kind = Literal["weight", "bias"]
KINDS: tuple[Kind, ...] = ("weight", "bias")
BESIDE = (*((slot, kind) for slot in ("pooler", "mlm", "mlm_norm", "pairs") for kind in KINDS), ("mlm_logits", "bias"))
"""Slots of dialects for what models have beside the tower, all of it stored alike."""


@runtime_checkable
class Foreign(Protocol):
    """A Source in a dialect of its own: its names are `dialect`'s, without a prefix.

    padding: how many rows less than this the vocabulary may have too many. `plain` gives the entry that a name of the
    trainer's own modules means. `contradictions` says in what the checkpoint is of another model than the tower's.
    """

    dialect: Dialect
    padding: int
    plain: Callable[[str], str]

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def contradictions(self, t: Tower) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """One tower of a model, where the model keeps each parameter of it, and what their names begin with."""

    tower: Tower
    bindings: Sequence[Binding]
    prefix: str


def translate(source: Foreign, plans: Sequence[Plan], shapes: Mapping[str, torch.Size]) -> Names:
    """What makes the model's tensors, whose `shapes` are given, of the source's."""
    if len(plans) != 1:
        raise WeightError(f"a checkpoint in {source.dialect.name} holds one tower, and the model has {len(plans)}")
    (plan,) = plans
    targets: list[Target] = []
    problems = source.contradictions(plan.tower)
    claimed: set[str] = set()
    for live in plan.bindings:
        keys = _keys(source, live.param)
        if keys is None:
            continue
        claimed.update(live.keys)
        theirs = Binding(live.param, keys, source.dialect)
        wrong = list(_misshapen(theirs, source))
        problems += wrong
        if not wrong:
            targets.append(Target(keys, partial(_make, theirs, live), theirs))
    for name, stored_name in _beside(source, plan, shapes):
        if name not in claimed:
            claimed.add(name)
            rows = shapes[name][0] if _padded(source, stored_name, shapes[name]) else None
            targets.append(Target((stored_name,), partial(_single, name, stored_name, rows)))
    used = {s for t in targets for s in t.sources} | {s for b in plan.bindings for s in _keys(source, b.param) or ()}
    left = [n for n in source.entries if n not in used]
    heads = _heads(source, plan.tower)
    return Names(
        tuple(targets),
        tuple(n for n in left if n not in heads),
        tuple(n for n in left if n in heads),
        tuple(problems),
        frozenset(claimed),
    )


def _keys(source: Foreign, p: Param) -> tuple[str, ...] | None:
    """The entries that hold a parameter; None where one is missing. A head that is not stored is the tokens' table."""
    d = source.dialect
    if not d.knows(p):
        return None
    found = [key(n, p.kind, source.entries.__contains__) for n in d.names(p, "")]
    if found == [None] and (p.slot, p.kind) == ("head", "weight"):
        found = [key(str(d.slots["tokens"]), "weight", source.entries.__contains__)]
    return tuple(k for k in found if k is not None) if None not in found else None


def _misshapen(b: Binding, source: Foreign) -> Iterator[str]:
    for k, t in zip(b.keys, stored(b, torch.empty(b.param.shape, device="meta")), strict=True):
        entry, want = source.entries[k], _squeezed(t.shape)
        if _squeezed(entry.shape) == want or (b.param.role == "vocab" and _padded(source, k, t.shape)):
            continue
        more = f" (and up to {source.padding - 1} rows of padding)" if b.param.role == "vocab" else ""
        yield f"{k} ({entry.file}) is {tuple(entry.shape)}, the model needs {tuple(t.shape)}{more}"


def _squeezed(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _padded(source: Foreign, name: str, want: Sequence[int]) -> bool:
    """Whether an entry is a vocabulary's table with rows of padding behind those that are wanted."""
    rows, *columns = source.entries[name].shape or (0,)
    return columns == list(want[1:]) and 0 < rows - want[0] < source.padding


def _make(theirs: Binding, live: Binding, read: Read) -> dict[str, Tensor]:
    tensors = {k: read(k) for k in theirs.keys}
    if theirs.param.role == "vocab":
        tensors = {k: t[: theirs.param.shape[0]] for k, t in tensors.items()}
    canonical = fetch(theirs, tensors)
    return dict(zip(live.keys, stored(live, canonical), strict=True))


def _single(name: str, stored_name: str, rows: int | None, read: Read) -> dict[str, Tensor]:
    t = read(stored_name)
    return {name: t if rows is None else t[:rows]}


def _beside(source: Foreign, plan: Plan, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, str]]:
    """Names of the model and of the source for one tensor each: under names of the trainer's own, or by slots."""
    for name in shapes:
        if source.plain(name) in source.entries:
            yield name, source.plain(name)
    for slot, kind in BESIDE:
        theirs = key(str(source.dialect.slots.get(slot)), kind, source.entries.__contains__)
        for d in dict.fromkeys(b.dialect.name for b in plan.bindings):
            live = next(b.dialect for b in plan.bindings if b.dialect.name == d).slots.get(slot)
            if theirs is None or not isinstance(live, str):
                continue
            full = live[1:] if live.startswith("/") else plan.prefix + live
            name = key(full, kind, shapes.__contains__)
            if name is not None:
                yield name, theirs


def _heads(source: Foreign, t: Tower) -> set[str]:
    """Entries that belong to heads that a model may do without."""
    slots = [*BESIDE, *([("head", kind) for kind in KINDS] if t.head is None else [])]
    found = (key(str(source.dialect.slots.get(slot)), kind, source.entries.__contains__) for slot, kind in slots)
    return {k for k in found if k is not None}
