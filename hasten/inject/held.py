"""Which of the stages that hold a model's layers one after the other holds each parameter, and who tells the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hasten.inject.joining import Division
from hasten.parallel import Chain
from hasten.spec import Tower
from hasten.weights import Binding, holders


@dataclass(frozen=True, slots=True)
class Held:
    """`stages`: those that hold a parameter, by its canonical name."""

    chain: Chain
    stages: Mapping[str, tuple[int, ...]]

    def here(self, b: Binding) -> bool:
        return self.chain.rank in self.stages[b.param.name]

    def apart(self, b: Binding) -> bool:
        """Whether some stage does without it."""
        return len(self.stages[b.param.name]) < self.chain.size

    def told(self, b: Binding, own: Tensor) -> Tensor:
        """The tensor of the first stage that holds the parameter; every stage calls this, with a tensor like it."""
        return self.chain.broadcast(own, self.stages[b.param.name][0]).wait()


def held(t: Tower, bindings: Sequence[Binding], division: Division | None) -> Held | None:
    """Who holds what of a backbone; None where layers are not cut into stages.

    One stored tensor may serve several blocks: all of their stages hold it. Tables of the vocabulary are everywhere
    where modules read them that no stage can tell (`leavable`).
    """
    chain = None if division is None else division.place.chain
    if division is None or chain is None:
        return None
    cuts = division.cuts(t)
    everywhere = range(len(cuts))
    told = {b.param.name for b in bindings if b.param.role != "vocab" or b.param.slot in division.leaving}
    found = {b.param.name: holders(t, b.param, cuts) if b.param.name in told else everywhere for b in bindings}
    together: dict[tuple[str, ...], set[int]] = {}
    for b in bindings:
        together.setdefault(b.keys, set()).update(found[b.param.name])
    return Held(chain, {b.param.name: tuple(sorted(together[b.keys])) for b in bindings})
