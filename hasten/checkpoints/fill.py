"""A model filled from a Source: first everything is checked, then tensor after tensor is read to its place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hasten.checkpoints.files import together
from hasten.checkpoints.joining import Joined
from hasten.checkpoints.names import Names, Target, match, may_be_missing, place_of
from hasten.checkpoints.rebuild import rebuild
from hasten.checkpoints.source import Source
from hasten.checkpoints.split import Split, cuts_of
from hasten.checkpoints.translate import Foreign, Plan, translate
from hasten.errors import WeightError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of a module that holds a tensor: `name` from the model down."""

    name: str
    module: nn.Module
    kind: str  # which dict of the module: "_parameters", "_buffers" or "__dict__"
    persistent: bool

    @property
    def key(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.kind)[self.key]

    def put(self, t: Tensor) -> None:
        getattr(self.module, self.kind)[self.key] = t


class Filling:
    """A checkpoint on its way into a model: `Filling` checks, `fill` fills, and `undo` empties what was on meta.

    Tensors on the meta device become tensors of `dtype` (None: the model's own) on a device, and tied ones stay one.
    Tensors with values are overwritten in place.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        dtype: torch.dtype | None,
        plans: Callable[[], Sequence[Plan]] | None = None,
    ) -> None:
        """`plans` describes the model's towers, which sources in a dialect of their own need.

        Raises WeightError with everything in which checkpoint and model differ; the model is as it was.
        """
        self.model, self.source, self.dtype, self._plans = model, source, dtype, plans
        self._before = [(m, dict(m._parameters), dict(m._buffers), _bare(m)) for m in model.modules()]
        self.meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        try:
            if self.meta and hasattr(model, "tie_weights"):
                model.tie_weights()  # type: ignore[operator]  # accelerate's init_empty_weights unties them
            self._plan()
        except BaseException:
            self.undo()
            raise

    def _plan(self) -> None:
        self._groups: dict[int, list[Slot]] = defaultdict(list)
        for slot in _slots(self.model):
            self._groups[id(slot.tensor)].append(slot)
        self._group = {s.name: id(s.tensor) for slots in self._groups.values() for s in slots}
        expected = {s.name: s for slots in self._groups.values() for s in slots if s.persistent}
        names = self._match(expected)
        found, problems = self._found(names, expected)
        problems += names.problems
        claimed = {self._group[n] for n in names.claimed}
        missing = [n for n in expected if self._group[n] not in found and self._group[n] not in claimed]
        optional = may_be_missing(self.model)
        problems += [f"missing: {n}" for n in missing if not optional(n)]
        problems += [f"unexpected: {n} ({self.source.entries[n].file})" for n in names.unexpected]
        problems += list(self._untied(found))
        if problems:
            kind = type(self.model).__name__
            raise WeightError(together(f"the checkpoint {self.source.origin} does not fit {kind}", problems))
        self.targets, self.heads = names.targets, names.heads
        lacking = [slots[0] for i, slots in self._groups.items() if i not in found and slots[0].tensor.is_meta]
        self._made = rebuild(self.model, {s.name for s in lacking}) if lacking else {}

    def _match(self, expected: dict[str, Slot]) -> Names:
        if isinstance(self.source, Split) and self._plans is not None:
            cuts = {n: c for p in self._plans() for n, c in cuts_of(p.bindings).items()}
            places = {n: place_of(self.model, n, expected) for n in self.source.entries}
            shapes = {n: expected[p].tensor.shape for n, p in places.items() if p is not None}
            self.source = self.source.fitted(shapes.get, {n: cuts[p] for n, p in places.items() if p in cuts})
        if isinstance(self.source, Foreign) and self._plans is not None:
            return translate(self.source, self._plans(), {n: s.tensor.shape for n, s in expected.items()})
        return match(self.model, self.source.entries, expected)

    def _found(self, names: Names, expected: dict[str, Slot]) -> tuple[dict[int, list[tuple[str, Target]]], list[str]]:
        """What the targets make, by the tensor that it is for, and what is wrong with it."""
        found: dict[int, list[tuple[str, Target]]] = defaultdict(list)
        problems: list[str] = []
        for target in names.targets:
            where = f"({', '.join(dict.fromkeys(self.source.entries[s].file for s in target.sources))})"
            try:
                made = target.make(self._outline)
            except Exception as e:  # rules of transformers, given tensors that do not belong together
                problems.append(f"{', '.join(target.sources)} {where} cannot be converted: {type(e).__name__}: {e}")
                continue
            for name, t in made.items():
                if name not in expected:
                    problems.append(f"unexpected: {name} {where}")
                    continue
                found[self._group[name]].append((name, target))
                problems += [f"{name} {where} {p}" for p in _differences(t, expected[name].tensor, self.model)]
        return found, problems

    def _outline(self, name: str) -> Tensor:
        entry = self.source.entries[name]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def _untied(self, found: dict[int, list[tuple[str, Target]]]) -> Iterator[str]:
        """Tensors that are one in the model, and stored twice with different values."""
        for several in found.values():
            first, *others = [(n, t.sources[0]) for n, t in several if len(t.sources) == 1] or [("", "")]
            for name, stored in others:
                if self.source.entries[stored].shape != self.source.entries[first[1]].shape:
                    continue  # one of them has been reported
                if not torch.equal(self.source.read(first[1]), self.source.read(stored)):
                    file = self.source.entries[stored].file
                    yield f"{name} ({file}) differs from {first[0]}, and they are one tensor in the model"

    @torch.no_grad()
    def fill(self, device: torch.device) -> None:
        """Read every tensor to `device`, where the rest of the model follows. If it fails, `undo` is to be called."""
        done: set[int] = set()
        for name, value in self._made.items():
            self._put(self._groups[self._group[name]], value, device)
        for target in tqdm(self.targets, unit="tensor", desc=self.source.origin, leave=False, disable=None):
            self._read(target, done, device)
        self._gather(device)

    def _read(self, target: Target, done: set[int], device: torch.device) -> None:
        """One target's tensors to their places; when it returns, nothing holds what was read."""
        for name, value in target.make(self.source.read).items():
            if self._group[name] not in done:
                done.add(self._group[name])
                self._put(self._groups[self._group[name]], value, device)

    def _put(self, slots: list[Slot], value: Tensor, device: torch.device) -> None:
        t, floating = slots[0].tensor, slots[0].tensor.is_floating_point()
        dtype = self.dtype if self.dtype and floating and any(s.persistent for s in slots) else t.dtype
        if not t.is_meta and t.dtype == dtype and t.device == device:
            t.data.copy_(value)
            return
        new = torch.empty(value.shape, dtype=dtype, device=device).copy_(value)
        if not t.is_meta:
            t.data = new
            return
        new = nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new
        for slot in slots:
            slot.put(new)

    def _gather(self, device: torch.device) -> None:
        """Bring what had values and came from no file to the device of the rest."""
        for slots in self._groups.values():
            t = slots[0].tensor
            if t.device != device and isinstance(t, nn.Parameter):
                t.data = t.data.to(device)
            elif t.device != device:
                moved = t.to(device)  # another tensor, so that `undo` has the one that was
                for slot in slots:
                    slot.put(moved)

    def undo(self) -> None:
        """Every parameter and buffer of the modules as before; tensors that had values keep the new ones."""
        for m, parameters, buffers, bare in self._before:
            m._parameters.update(parameters)
            m._buffers.update(buffers)
            m.__dict__.update(bare)

    @property
    def notes(self) -> list[str]:
        """What explain() tells of it."""
        joined = self.source.files if isinstance(self.source, Joined) else ()
        files = joined or {e.file for e in self.source.entries.values()}
        notes = [f"checkpoint: {len(self.source.entries)} tensors of {len(files)} files from {self.source.origin}"]
        if self.heads:
            notes.append(f"checkpoint: left out, as the model has no such head: {', '.join(self.heads)}")
        return notes


def _slots(model: nn.Module) -> Iterator[Slot]:
    """Every place of the model that holds a tensor; shared modules and tied tensors under each of their names."""
    for path, m in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        yield from (Slot(prefix + n, m, "_parameters", True) for n, p in m._parameters.items() if p is not None)
        for n, b in m._buffers.items():
            if b is not None:
                yield Slot(prefix + n, m, "_buffers", n not in m._non_persistent_buffers_set)
        yield from (Slot(prefix + n, m, "__dict__", False) for n in _bare(m))


def _bare(module: nn.Module) -> dict[str, Tensor]:
    """Tensors on the meta device that a module keeps as plain attributes."""
    return {n: t for n, t in vars(module).items() if isinstance(t, Tensor) and t.is_meta}


def _differences(stored: Tensor, live: Tensor, model: nn.Module) -> Iterator[str]:
    if stored.shape != live.shape:
        says = _contradicted(stored.shape, live.shape, getattr(model, "config", None))
        yield f"is {tuple(stored.shape)}, the model's is {tuple(live.shape)}{says}"
    fits = stored.dtype in FLOATS if live.is_floating_point() else torch.can_cast(stored.dtype, live.dtype)
    if not fits:
        yield f"is {stored.dtype}, which cannot be cast to the model's {live.dtype}".replace("torch.", "")


def _contradicted(stored: torch.Size, live: torch.Size, config: Any) -> str:
    """The fields of the config that the model's differing sizes may come from."""
    if config is None or len(stored) != len(live):
        return ""
    sizes = {n for n, o in zip(live, stored, strict=True) if n != o}
    fields = sorted(n for n, v in config.to_dict().items() if type(v) is int and v in sizes)
    plain = [n for n in fields if re.search("size|dim|embd|inner|width|position|vocab|layer|head|label", n)] or fields
    return f" (config: {', '.join(f'{n}={getattr(config, n, None)}' for n in plain)})" if plain else ""
