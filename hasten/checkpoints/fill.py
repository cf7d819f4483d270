"""A model filled from a Source: first everything is checked, then tensor after tensor is read to its place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hasten.checkpoints.copying import Copies
from hasten.checkpoints.files import together
from hasten.checkpoints.joining import Joined
from hasten.checkpoints.names import Names, Target, match, may_be_missing, place_of
from hasten.checkpoints.rebuild import rebuild
from hasten.checkpoints.shares import Reader, give_share, new_share, read_share
from hasten.checkpoints.slots import Slot, bare, slots_of
from hasten.checkpoints.slots import replace as replace_in
from hasten.checkpoints.source import Source
from hasten.checkpoints.split import Split, cuts_of
from hasten.checkpoints.translate import Foreign, Plan, translate
from hasten.errors import WeightError
from hasten.weights import Binding

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Piece:
    """What is read at once. names: of the model's tensors that it makes. plain: it is one stored tensor as it is."""

    target: Target
    names: tuple[str, ...]
    plain: bool


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
        self._before = [(m, dict(m._parameters), dict(m._buffers), bare(m)) for m in model.modules()]
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
        for slot in slots_of(self.model):
            self._groups[id(slot.tensor)].append(slot)
        self._group = {s.name: id(s.tensor) for slots in self._groups.values() for s in slots}
        expected = {s.name: s for slots in self._groups.values() for s in slots if s.persistent}
        names = self._match(expected)
        self._pieces: list[Piece] = []
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
        self.heads = names.heads
        self._makers = {self._group[n]: p for p in reversed(self._pieces) for n in p.names}
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
            outlines = {s: self._outline(s) for s in target.sources}
            try:
                made = target.make(outlines.__getitem__)
            except Exception as e:  # rules of transformers, given tensors that do not belong together
                problems.append(f"{', '.join(target.sources)} {where} cannot be converted: {type(e).__name__}: {e}")
                continue
            plain = len(made) == 1 and next(iter(made.values())) is outlines[target.sources[0]]
            self._pieces.append(Piece(target, tuple(n for n in made if n in expected), plain))
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
    def fill(self, device: torch.device, who: Reader | None = None) -> dict[tuple[str, ...], Tensor]:
        """Read every tensor to `device`, where the rest of the model follows. If it fails, `undo` is to be called.

        who: one of several ranks. What they divide it reads its share of only, and gives them by the names of the
        model's tensors; those keep what they hold, or, on the meta device, become zeros without memory, and so do those
        of which it keeps nothing.
        """
        shares: dict[tuple[str, ...], Tensor] = {}
        divided = {} if who is None else self._divided(who)
        apart = [k for keys in divided for k in keys] + ([] if who is None else sorted(who.away))
        done = {self._group[k] for k in apart}
        quiet = True if who is not None and who.silent else None
        bar = tqdm(total=len(self._pieces), unit="tensor", desc=self.source.origin, leave=False, disable=quiet)
        with bar, Copies(device) as copy:
            for name, value in self._made.items():
                self._put(self._groups[self._group[name]], value, device, copy)
            for b in divided.values():
                assert who is not None
                shares[b.keys] = self._share(b, who, copy)
                bar.update(len(b.keys))
            for k in apart if self.meta else ():
                self._hollow(self._groups[self._group[k]], device)
            for piece in self._pieces:
                wanted = {self._group[n] for n in piece.names} - done
                done |= wanted
                if wanted:
                    bar.update()
                    self._put_piece(piece, wanted, device, copy)
        self._gather(device)
        return shares

    def _put_piece(self, piece: Piece, wanted: set[int], device: torch.device, copy: Copies) -> None:
        for name, value in piece.target.make(self.source.read).items():
            if self._group[name] in wanted:
                wanted.remove(self._group[name])
                self._put(self._groups[self._group[name]], value, device, copy)
        if not piece.plain:
            copy.wait()  # what was made for it takes memory

    def _put(self, slots: list[Slot], value: Tensor, device: torch.device, copy: Copies) -> None:
        t, dtype = slots[0].tensor, self._dtype(slots)
        if not t.is_meta and t.dtype == dtype and t.device == device:
            copy(t.data, value)
            return
        new = torch.empty(value.shape, dtype=dtype, device=device)
        copy(new, value)
        if t.is_meta:
            replace_in(slots, new)
        else:
            t.data = new

    def _dtype(self, slots: list[Slot]) -> torch.dtype:
        t = slots[0].tensor
        return self.dtype if self.dtype and t.is_floating_point() and any(s.persistent for s in slots) else t.dtype

    def _share(self, b: Binding, who: Reader, copy: Copies) -> Tensor:
        """This rank's share of a parameter of the model."""
        slots = [self._groups[self._group[k]] for k in b.keys]
        own = new_share(b, who, self._dtype(slots[0]))
        pieces = [self._makers[self._group[k]] for k in b.keys]
        theirs = pieces[0].target.binding
        if theirs is None and all(p.plain for p in pieces):
            theirs = replace(b, keys=tuple(p.target.sources[0] for p in pieces))
        if theirs is not None:
            read_share(own, theirs, self.source, who, copy)
            return own
        whole: dict[int, Tensor] = {}
        for p in {id(p): p for p in pieces}.values():
            whole |= {self._group[n]: t for n, t in p.target.make(self.source.read).items()}
        give_share(own, b, {k: whole[self._group[k]] for k in b.keys}, who, copy)
        return own

    def _divided(self, who: Reader) -> dict[tuple[str, ...], Binding]:
        """What ranks read shares of, by the model's names, in the order of the source's files."""
        known = [
            b for p in (self._plans or list)() for b in p.bindings if who.divides(b) and who.away.isdisjoint(b.keys)
        ]
        found = [b for b in known if all(self._group[k] in self._makers for k in b.keys)]
        order = {n: i for i, n in enumerate(self.source.entries)}
        found.sort(key=lambda b: order[self._makers[self._group[b.keys[0]]].target.sources[0]])
        return {b.keys: b for b in found}

    def _hollow(self, slots: list[Slot], device: torch.device) -> None:
        """Zeros in the place of a tensor on the meta device, all of them one."""
        t = slots[0].tensor
        if t.is_meta:
            replace_in(slots, torch.zeros((), dtype=self._dtype(slots), device=device).expand(t.shape))

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
        for m, parameters, buffers, plain in self._before:
            m._parameters.update(parameters)
            m._buffers.update(buffers)
            m.__dict__.update(plain)

    @property
    def notes(self) -> list[str]:
        """What explain() tells of it."""
        joined = self.source.files if isinstance(self.source, Joined) else ()
        files = joined or {e.file for e in self.source.entries.values()}
        notes = [f"checkpoint: {len(self.source.entries)} tensors of {len(files)} files from {self.source.origin}"]
        if self.heads:
            notes.append(f"checkpoint: left out, as the model has no such head: {', '.join(self.heads)}")
        return notes


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
