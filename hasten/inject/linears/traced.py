"""Plans from what a model computes: pairs of linears of which the second takes what the first gave, and nothing else.

While the model runs on a probe, every linear's output is made the beginning of a graph of its own (autograd's). The
graph behind a linear's input then ends at the linears that it depends on. Linears that feed one other alone, which
nothing else of any width reaches, may be divided as a pair: the first by outputs, the second by inputs. Whether that is
exact (the elements between them may be mixed) the rehearsal tells; pairs that are not stay whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten.inject.linears.choice import Refused, alike, settle
from hasten.inject.linears.draft import Draft
from hasten.inject.linears.matrices import inputs, linears, outputs
from hasten.inject.linears.plan import Plan
from hasten.inject.linears.probes import Probe, tensors
from hasten.inject.linears.rehearsal import Seen

SOURCE = "a trace of what it computes"

Pairs = dict[str, tuple[str, ...]]
"""By a linear that is summed behind, the linears that feed it alone."""


def trace(model: nn.Module, probe: Probe) -> Pairs:
    """The pairs of a model, in the order of its calls; a linear is in one of them."""
    feeds = _Feeds(model)
    feeds.run(probe)
    taken, pairs = _apart(model), Pairs()
    for second, sources in feeds.sources.items():
        if not sources or second in taken or not taken.isdisjoint(sources):
            continue
        if all(feeds.consumers.get(first) == {second} for first in sources):
            pairs[second] = tuple(sorted(sources))
            taken |= {second, *sources}
    return pairs


def _apart(model: nn.Module) -> set[str]:
    """Linears that cannot be divided: their parameters are others' too, or their forward is not theirs."""
    users = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = linears(model).items()
    return {path for path, m in found if "forward" in vars(m) or any(users[id(p)] > 1 for p in m.parameters())}


def draft(model: nn.Module, pairs: Pairs, size: int) -> Draft:
    made = Draft(model, SOURCE, size)
    for second, sources in pairs.items():
        width = inputs(made.modules[second])
        made.rows(second)
        for first in sources:
            made.columns(first)
            runs = outputs(made.modules[first]) / width
            made.packed[first] = int(runs) if runs in (2, 3) else 1
    return made


def exact(model: nn.Module, pairs: Pairs, size: int, seen: list[Seen]) -> tuple[Plan, dict[str, str]]:
    """The plan of the pairs that are exact, and why the others are not. Raises Refused where none is left."""
    left, dropped = dict(pairs), dict[str, str]()
    while left:
        fitting = draft(model, left, size)
        try:
            return settle(fitting, seen), dropped
        except Refused as error:
            bad = _of(left, error, fitting)
            dropped |= {alike(second): error.why for second in bad}
            left = {second: first for second, first in left.items() if second not in bad}
    raise Refused("; ".join(dict.fromkeys(dropped.values())) or "no linear takes what others alone have given")


def _of(pairs: Pairs, error: Refused, made: Draft) -> list[str]:
    """The pairs at which a rehearsal stopped, with those of layers alike; all, where it does not tell."""
    wide = {c.name.rpartition(".")[0]: (c, made.parameters[c.name].shape[c.axis]) for c in made.plan().cuts}
    unequal = {path for path, (c, width) in wide.items() if not c.fits(width, made.size)}
    hit = {s for s, first in pairs.items() if unequal & {s, *first}}
    hit = hit or {s for s, first in pairs.items() if error.path in (s, *first)}
    kinds = {alike(s) for s in hit}
    return [s for s in pairs if not hit or alike(s) in kinds]


class _Feeds:
    """sources: by linear, those that its input depends on; None where it depends on anything else that is wide."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sources: dict[str, set[str] | None] = {}
        self.consumers: dict[str, set[str]] = {}
        self._leaves: dict[int, tuple[str, Tensor]] = {}

    def run(self, probe: Probe) -> None:
        hooks: list[Any] = []
        asked = {p: p.requires_grad for p in self.model.parameters()}
        try:
            for p in asked:
                p.requires_grad_(True)
            for path, m in linears(self.model).items():
                hooks += [m.register_forward_pre_hook(self._before(path)), m.register_forward_hook(self._behind(path))]
            own = probe.fitted(self.model)
            with torch.enable_grad():
                output = self.model(*_tracked(own.args), **_tracked(own.kwargs))
        finally:
            for h in hooks:
                h.remove()
            for p, wanted in asked.items():
                p.requires_grad_(wanted)
        for t in tensors(output):
            self._consume("", t)

    def _before(self, path: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            found = self._consume(path, args[0]) if args else None
            before = self.sources.get(path, found)
            self.sources[path] = found if before == found else None

        return look

    def _behind(self, path: str) -> Callable[..., Tensor]:
        def begin(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            self._leaves[id(leaf)] = path, leaf
            return leaf.clone()  # which may be changed in place

        return begin

    def _consume(self, path: str, t: Tensor) -> set[str] | None:
        """Note what a tensor depends on; None where that is not linears alone."""
        found, alone = set[str](), True
        for leaf in _ends(t):
            source = self._leaves.get(id(leaf))
            if source is not None:
                found.add(source[0])
                self.consumers.setdefault(source[0], set()).add(path)
            alone = alone and (source is not None or leaf.ndim < 2)  # a norm's weights may lie between
        return found if alone else None


def _tracked(given: Any) -> Any:
    """Arguments whose floats tell who depends on them."""

    def follow(t: Any) -> Any:
        wide = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().clone().requires_grad_() if wide else t

    return {n: follow(t) for n, t in given.items()} if isinstance(given, dict) else tuple(follow(t) for t in given)


def _ends(t: Tensor) -> Iterator[Tensor]:
    """The tensors at which the graph behind a tensor ends."""
    if t.grad_fn is None:
        yield from [t] if t.requires_grad else []
        return
    known, stack = set[Any](), [t.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += [n for n, _ in node.next_functions]
