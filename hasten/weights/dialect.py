"""Where one source keeps each canonical parameter: slot to stored names, and how they are packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hasten.weights.packing import SEQUENTIAL, Packing
from hasten.weights.plan import Param


@dataclass(frozen=True, slots=True)
class Packed:
    """One stored tensor that holds all parts of a parameter."""

    name: str
    packing: Packing = SEQUENTIAL


Stored = str | tuple[str, ...] | Packed


@dataclass(frozen=True, slots=True)
class Dialect:
    """One naming scheme of one architecture.

    Names are relative to the backbone, inside a block to `block`; a leading "/" makes one relative to the whole model.
    A name stands for `name.weight` and `name.bias`, or for a bare tensor. A tuple names one tensor per part. `{e}` is
    an expert, `{h}` a head. A slot may be given for one kind alone ("up.bias"). `transposed` slots are (in, out).
    """

    name: str
    block: str
    slots: Mapping[str, Stored]
    transposed: frozenset[str] = frozenset()

    def names(self, p: Param, prefix: str) -> list[str]:
        """Full stored names of p, without weight or bias: expert by expert, part by part; absent parts left out."""
        stored = self._stored(p)
        inside = f"{prefix}{self.block.format(i=p.block)}" if p.block is not None else prefix
        bare = (stored.name,) if isinstance(stored, Packed) else (stored,) if isinstance(stored, str) else stored
        whole = [n[1:] if n.startswith("/") else inside + n for n in bare]
        if "{h}" in whole[0]:
            return [whole[0].replace("{h}", str(h)) for h in range(len(p.parts))]
        if len(whole) == len(p.parts) and p.absent:
            whole = [n for n, absent in zip(whole, p.absent, strict=True) if not absent]
        if "{e}" in whole[0]:
            return [n.replace("{e}", str(e)) for e in range(p.stack) for n in whole]
        return whole

    def packing(self, p: Param) -> Packing:
        stored = self._stored(p)
        return stored.packing if isinstance(stored, Packed) else SEQUENTIAL

    def knows(self, p: Param) -> bool:
        return p.slot in self.slots or f"{p.slot}.{p.kind}" in self.slots

    def _stored(self, p: Param) -> Stored:
        return self.slots.get(f"{p.slot}.{p.kind}", self.slots.get(p.slot, p.slot))


def key(name: str, kind: str, exists: Callable[[str], bool]) -> str | None:
    """The stored tensor that a name means: `name.weight` or bare, `name.bias` or `name_bias`; None if there is none."""
    options = (f"{name}.weight", name) if kind == "weight" else (f"{name}.bias", f"{name}_bias")
    return next((k for k in options if exists(k)), None)
