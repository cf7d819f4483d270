"""Canonical weights borrowed from a live model: one copy in memory, seen by both.

Where the canonical tensor's memory also spells the stored layout, the live parameter becomes a view of it. Where it
does not (rows interleaved head by head), the live parameter is emptied, and filled again from the canonical tensor
whenever somebody needs it: `state_dict`, the model's own forward, `give_back`. So are those of which ranks hold a share
each: filling them is a call that all ranks make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hasten.inject.held import Held
from hasten.inject.joining import Division
from hasten.weights import Binding, fetch, is_split, join, shard, share, stored, views


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


class Loan:
    """The weights of one backbone, or this rank's shares of them. `weights` maps canonical names to tensors.

    The shares are made one at a time where the live model is, and only they go to the division's device and dtype.
    held: which stages hold what; the others have nothing of it.
    """

    def __init__(
        self,
        model: nn.Module,
        bindings: Sequence[Binding],
        division: Division | None = None,
        shares: Mapping[tuple[str, ...], Tensor] | None = None,
        held: Held | None = None,
    ) -> None:
        """shares: by the live names of their parameters, what this rank has read already."""
        self.model, self.bindings, self.division, self.held = model, bindings, division, held
        self._read = {b.keys: shares[b.keys] for b in bindings if shares and b.keys in shares}
        self.weights: dict[str, Tensor] = {}
        self.emptied: dict[str, tuple[Binding, int, torch.Size]] = {}  # key: its binding, place in it, live shape
        self.homes: dict[str, torch.device] = {}  # where whole tensors go that ranks have shares of

    def take(self) -> None:
        """Borrow everything; what was borrowed when that fails, `give_back` gives back."""
        tensors = live_tensors(self.model)
        for b in self.bindings:
            self._take(b, tensors)

    def _take(self, b: Binding, tensors: Mapping[str, Tensor]) -> None:
        if self.held is not None and not self.held.here(b):
            self._leave(b, tensors)
            return
        shared = next((o for o in self.bindings if o.keys == b.keys and o.param.name in self.weights), None)
        if shared is not None:  # one stored tensor serves several blocks
            self.weights[b.param.name] = self.weights[shared.param.name]
            return
        if divides(self.division, b):
            self._divide(b, tensors)
            return
        canonical = fetch(b, {k: tensors[k].detach() for k in b.keys})
        self.weights[b.param.name] = canonical
        seen = views(b, canonical) or [None] * len(b.keys)
        for place, (k, view) in enumerate(zip(b.keys, seen, strict=True)):
            live = tensors[k]
            if _same_memory(live, canonical):
                continue
            if view is None:
                self.emptied[k] = (b, place, live.shape)
                live.data = live.data.new_empty(0)
            else:
                live.data = view.view(live.shape) if view.is_contiguous() else view

    def _divide(self, b: Binding, tensors: Mapping[str, Tensor]) -> None:
        assert self.division is not None
        own = self._read[b.keys] if b.keys in self._read else self._share(b, tensors)
        self.weights[b.param.name] = own
        self._read.pop(b.keys, None)
        for place, k in enumerate(b.keys):
            self.emptied[k] = (b, place, tensors[k].shape)
            self.homes[k] = self.division.home or tensors[k].device
            tensors[k].data = self.resting(b, tensors[k])

    def _leave(self, b: Binding, tensors: Mapping[str, Tensor]) -> None:
        """Nothing of a parameter that another stage holds."""
        d = self.division
        assert d is not None
        for place, k in enumerate(b.keys):
            if k not in self.emptied:
                live = tensors[k]
                self.emptied[k] = (b, place, live.shape)
                self.homes[k] = d.home or live.device
                live.data = torch.empty(0, dtype=d.dtype or live.dtype, device=d.device or live.device)

    def _untaken(self, b: Binding) -> Tensor:
        """The share that this rank could have taken, or memory for the one that another stage holds."""
        tensors = live_tensors(self.model)
        if self.held is None or self.held.here(b):
            return self._share(b, tensors)
        d, live = self.division, tensors[b.keys[0]]
        assert d is not None
        p = share(b.param, d.group.size, d.experts) if divides(d, b) else b.param
        if b.keys[0] in self.emptied:
            return live.detach().new_empty(p.shape)
        return torch.empty(p.shape, dtype=d.dtype or live.dtype, device=d.device or live.device)

    def _together(self, b: Binding) -> bool:
        """Whether all ranks have to ask for a parameter's whole tensor."""
        return divides(self.division, b) or (self.held is not None and self.held.apart(b))

    def _share(self, b: Binding, tensors: Mapping[str, Tensor]) -> Tensor:
        d = self.division
        assert d is not None
        canonical = fetch(b, {k: tensors[k].detach() for k in b.keys})
        own = shard(b.param, canonical, d.group.rank, d.group.size, d.experts)
        return torch.empty(own.shape, dtype=d.dtype or own.dtype, device=d.device or own.device).copy_(own)

    def _canonical(self, b: Binding) -> Tensor:
        """The whole canonical tensor; all ranks ask for it where they divide it, also one that has taken no share."""
        own, d, held = self.weights.get(b.param.name), self.division, self.held
        if own is None:
            own = self._read[b.keys] if b.keys in self._read else self._untaken(b)
        if held is not None and held.apart(b):
            own = held.told(b, own)
        if d is None or not divides(d, b):
            return own
        shares = d.group.all_gather(own.detach().flatten()).view(d.group.size, *own.shape)
        return join(b.param, shares.unbind(), d.experts)

    def wholes(self, wanted: Callable[[str], bool] = lambda key: True) -> Iterator[tuple[str, Tensor]]:
        """Fresh tensors with the values of the emptied parameters that are wanted, in their live shapes."""
        done = set[tuple[str, ...]]()
        for b in self.bindings:  # in an order that all ranks have
            filling = [k for k in b.keys if k in self.emptied]
            if b.keys in done or not any(map(wanted, b.keys)) or not (filling or self._together(b)):
                continue
            done.add(b.keys)
            made = stored(b, self._canonical(b))
            for k in filter(wanted, filling):
                _, place, shape = self.emptied[k]
                yield k, made[place].reshape(shape)
            del made  # before the next is gathered

    def resting(self, b: Binding, live: Tensor) -> Tensor:
        """What a live parameter holds while nobody needs all of it: of a vocabulary this rank's rows, else nothing."""
        own = self.weights.get(b.param.name)
        if own is None:  # another stage's
            return live.detach().new_empty(0)
        return own if b.param.role == "vocab" else own.new_empty(0)

    def at_home(self, key: str, whole: Tensor) -> Tensor:
        """A whole tensor where the live one belongs."""
        return whole.to(self.homes.get(key, whole.device))

    def refresh(self, b: Binding) -> None:
        """Take the canonical values of a filled parameter from the live tensors again."""
        if b.param.name not in self.weights:
            return
        tensors = live_tensors(self.model)
        divided = divides(self.division, b)
        fresh = self._share(b, tensors) if divided else fetch(b, {k: tensors[k].detach() for k in b.keys})
        self.weights[b.param.name].copy_(fresh)

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Emptied parameters are whole inside: what the model's own code needs to run."""
        tensors = live_tensors(self.model) if self.emptied else {}
        for k, whole in self.wholes():
            tensors[k].data = whole
        try:
            yield
        finally:
            for k, (b, _, _) in self.emptied.items():
                tensors[k].data = self.resting(b, tensors[k])

    def give_back(self) -> None:
        """Every live parameter gets memory of its own again, with the same values; the loan is over.

        What ranks divided comes back to the device that it was on. All of them call this, whatever they have taken.
        """
        tensors, done = live_tensors(self.model), set[str]()
        for b in self.bindings:
            taken = b.param.name in self.weights or any(k in self.emptied for k in b.keys)
            if not (taken or self._together(b)) or not done.isdisjoint(b.keys):
                self.weights.pop(b.param.name, None)
                continue
            done.update(b.keys)
            apart = self._together(b) or any(k in self.emptied for k in b.keys)
            made = stored(b, self._canonical(b)) if apart else []
            if not taken:
                continue  # the other ranks have got their part of it
            self.weights.pop(b.param.name, None)
            for k in b.keys:
                live = tensors[k]
                if k in self.emptied:
                    whole = made[self.emptied[k][1]].reshape(self.emptied[k][2]).contiguous()
                    live.data = self.at_home(k, whole)
                elif len(b.keys) > 1 or not live.is_contiguous():
                    live.data = live.data.clone(memory_format=torch.contiguous_format)
        self.emptied.clear()

    def reapply(self, change: Callable[[Tensor], Tensor], apply: Callable[[], None]) -> None:
        """Move or cast the live parameters by `apply`, the emptied ones by `change`, and borrow them again."""
        names = {b.param.name for b, _, _ in self.emptied.values()} & self.weights.keys()
        kept = {name: change(self.weights[name]) for name in names}
        apply()
        tensors = live_tensors(self.model)
        self.weights.clear()
        for b in self.bindings:
            if b.param.name in kept:
                self.weights[b.param.name] = kept[b.param.name]
            else:
                self._take(b, tensors)
        for k, (b, _, _) in self.emptied.items():
            tensors[k].data = self.resting(b, tensors[k])


def divides(division: Division | None, b: Binding) -> bool:
    """Whether ranks hold shares of a parameter."""
    if division is None or division.group.size == 1:
        return False
    if b.param.role == "vocab" and b.param.slot not in division.vocabulary:
        return False
    return is_split(b.param, division.experts)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.device == b.device
