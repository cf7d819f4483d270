"""What a source leaves open, chosen by rehearsal: which integers count a rank's share, how fused outputs are packed.

Nothing is taken for its name. A change is made where a rehearsal stops, of as few things as get it any further; so
every change in a plan is one without which the rehearsal stops.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, islice

from torch import nn

from hasten.errors import UnsupportedModel
from hasten.inject.linears.draft import Draft
from hasten.inject.linears.plan import Count, Cut, Plan
from hasten.inject.linears.rehearsal import Mismatch, Rehearsal, Seen

TOGETHER = 4  # things changed at once, at most
TRIALS = 400  # rehearsals at one place, at most
SIZES = range(2, 9)  # numbers of ranks that a refusal tries

Change = Callable[[Plan], Plan]


@dataclass(frozen=True, slots=True)
class Refused(Exception):
    """A plan that no choice makes exact, and why."""

    why: str
    path: str = ""


def settle(draft: Draft, seen: list[Seen]) -> Plan:
    """The plan of a draft with everything chosen, if it is exact on every rank; else Refused."""
    if draft.problems:
        raise Refused("; ".join(draft.problems))
    plan = draft.plan()
    if not plan.cuts:
        raise Refused("it divides nothing")
    if problems := _unequal(draft, plan) or _untried(plan, seen):
        raise Refused("; ".join(problems))
    wrong = _first(draft.model, plan, seen)
    while wrong is not None:
        found = _further(draft, plan, seen, wrong)
        if found is None:
            raise Refused(str(wrong), wrong.path)
        plan, wrong = found
    rehearsal = Rehearsal(draft.model, plan, seen)
    try:
        for rank in range(plan.size):
            rehearsal.of(rank)
        rehearsal.sums()
    except Mismatch as error:
        raise Refused(str(error), error.path) from error
    return plan


def refusal(name: str, source: str, size: int, why: str, settles: Callable[[int], object]) -> UnsupportedModel:
    """The error of a model that cannot be divided so, with the numbers of ranks among which it can.

    settles: finds the plan for another number of ranks, or raises Refused.
    """
    fit = ["1"]
    for n in SIZES:
        try:
            if n != size:
                settles(n)
                fit.append(str(n))
        except Refused:
            continue
    others = ", ".join(fit)
    return UnsupportedModel(f"{name} cannot be divided among {size} ranks by {source} (it can among {others}): {why}")


def _unequal(draft: Draft, plan: Plan) -> list[str]:
    """What cannot be cut equally, one sentence for layers alike."""
    said: dict[str, str] = {}
    for c in plan.cuts:
        width = draft.parameters[c.name].shape[c.axis]
        if not c.fits(width, plan.size):
            runs = f" in {c.parts} runs" if c.parts > 1 else ""
            module = c.name.rpartition(".")[0]
            said.setdefault(alike(module), f"{module} is {width} wide{runs}, which {plan.size} does not divide")
    return list(said.values())


def _untried(plan: Plan, seen: list[Seen]) -> list[str]:
    """What the probes do not reach, nor anything like it, so that nothing is known of it."""
    tried = {alike(path) for s in seen for path in s.ran}
    cut = dict.fromkeys(alike(c.name.rpartition(".")[0]) for c in plan.cuts)
    return [f"no input tried reaches {path}: `dummy_inputs` of the model would" for path in cut if path not in tried]


def _first(model: nn.Module, plan: Plan, seen: list[Seen]) -> Mismatch | None:
    """Where the rehearsal of the first rank stops."""
    try:
        Rehearsal(model, plan, seen).of(0)
    except Mismatch as wrong:
        return wrong
    return None


def _further(draft: Draft, plan: Plan, seen: list[Seen], wrong: Mismatch) -> tuple[Plan, Mismatch | None] | None:
    changes = [*_countings(draft, plan, wrong.path), *_packings(draft, plan, wrong.path)]
    several = (c for n in range(1, TOGETHER + 1) for c in combinations(changes, n))
    for together in islice(several, TRIALS):
        changed = plan
        for change in together:
            changed = change(changed)
        if _unequal(draft, changed):
            continue
        now = _first(draft.model, changed, seen)
        if now is None or now.passed > wrong.passed:
            return changed, now
    return None


def _countings(draft: Draft, plan: Plan, path: str) -> Iterator[Change]:
    """Integers on the modules around a place, nearest first, that a width which is cut there is a multiple of."""
    for around in _around(path):
        module, prefix = draft.modules[around], f"{around}." if around else ""
        widths = {draft.parameters[c.name].shape[c.axis] for c in plan.cuts if c.name.startswith(prefix)}
        known = {(c.type, c.name, c.whole) for c in plan.counts}
        for name, value in vars(module).items():
            fits = type(value) is int and value > 1 and value % plan.size == 0
            if fits and any(w % value == 0 for w in widths) and (type(module).__name__, name, value) not in known:
                yield _counting(_everywhere(draft, plan, module, name, value))


def _everywhere(draft: Draft, plan: Plan, like: nn.Module, name: str, value: int) -> Count:
    """The same integer on every module of the class in which something is cut."""
    paths = [
        path
        for path, m in draft.modules.items()
        if type(m) is type(like)
        and vars(m).get(name) == value
        and any(c.name.startswith(f"{path}." if path else "") for c in plan.cuts)
    ]
    return Count(type(like).__name__, name, tuple(paths), value, value // plan.size)


def _counting(count: Count) -> Change:
    return lambda plan: replace(plan, counts=(*plan.counts, count))


def _packings(draft: Draft, plan: Plan, path: str) -> Iterator[Change]:
    """Linears near a place whose outputs may lie in several runs, those of layers alike together."""
    near = next((a for a in _around(path) if any(n.startswith(f"{a}.") for n in draft.packed)), "")
    one = {c.name.rpartition(".")[0] for c in plan.cuts if c.parts == 1}
    groups: dict[str, int] = {}
    for name, parts in draft.packed.items():
        if parts > 1 and name in one and name.startswith(f"{near}." if near else ""):
            groups.setdefault(alike(name), parts)
    for group, parts in groups.items():
        yield _packing(group, parts)


def _packing(group: str, parts: int) -> Change:
    def change(plan: Plan) -> Plan:
        return replace(plan, cuts=tuple(_run(c, parts) if _of(c) == group else c for c in plan.cuts))

    return change


def _of(cut: Cut) -> str:
    return alike(cut.name.rpartition(".")[0])


def _run(cut: Cut, parts: int) -> Cut:
    return replace(cut, parts=parts)


def _around(path: str) -> list[str]:
    """A module's path and those of the modules around it, innermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def alike(name: str) -> str:
    """A name with its numbers left open, which layers alike share."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)
