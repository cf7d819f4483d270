"""Canonical weights borrowed from a live model: one copy in memory, seen by both.

Where the canonical tensor's memory also spells the stored layout, the live parameter becomes a view of it. Where it
does not (rows interleaved head by head), the live parameter is emptied, and filled again from the canonical tensor
whenever somebody needs it: `state_dict`, the model's own forward, `give_back`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hasten.weights import Binding, fetch, stored


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


class Loan:
    """The weights of one backbone. `weights` maps canonical names to tensors."""

    def __init__(self, model: nn.Module, bindings: Sequence[Binding]) -> None:
        self.model, self.bindings = model, bindings
        self.weights: dict[str, Tensor] = {}
        self.emptied: dict[str, tuple[Binding, int, torch.Size]] = {}  # key: its binding, place in it, live shape
        tensors = live_tensors(model)
        for b in bindings:
            self._take(b, tensors)

    def _take(self, b: Binding, tensors: Mapping[str, Tensor]) -> None:
        shared = next((o for o in self.bindings if o.keys == b.keys and o.param.name in self.weights), None)
        if shared is not None:  # one stored tensor serves several blocks
            self.weights[b.param.name] = self.weights[shared.param.name]
            return
        canonical = fetch(b, {k: tensors[k].detach() for k in b.keys})
        self.weights[b.param.name] = canonical
        seen = stored(b, canonical) if _is_view(b, canonical) else [None] * len(b.keys)
        for place, (k, view) in enumerate(zip(b.keys, seen, strict=True)):
            live = tensors[k]
            if _same_memory(live, canonical):
                continue
            if view is None:
                self.emptied[k] = (b, place, live.shape)
                live.data = live.data.new_empty(0)
            else:
                live.data = view.view(live.shape) if view.is_contiguous() else view

    def whole(self, key: str) -> Tensor:
        """A fresh tensor with the value of an emptied parameter, in its live shape."""
        b, place, shape = self.emptied[key]
        return stored(b, self.weights[b.param.name])[place].reshape(shape)

    def refresh(self, b: Binding) -> None:
        """Take the canonical values of a filled parameter from the live tensors again."""
        tensors = live_tensors(self.model)
        self.weights[b.param.name].copy_(fetch(b, {k: tensors[k].detach() for k in b.keys}))

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Emptied parameters are whole inside: what the model's own code needs to run."""
        tensors = live_tensors(self.model) if self.emptied else {}
        for k in self.emptied:
            tensors[k].data = self.whole(k)
        try:
            yield
        finally:
            for k in self.emptied:
                tensors[k].data = tensors[k].data.new_empty(0)

    def give_back(self) -> None:
        """Every live parameter gets memory of its own again, with the same values; the loan is over."""
        tensors = live_tensors(self.model)
        for b in self.bindings:
            canonical = self.weights.pop(b.param.name, None)
            if canonical is None:
                continue
            for k in b.keys:
                live = tensors[k]
                if k in self.emptied:
                    live.data = stored(b, canonical)[self.emptied[k][1]].reshape(self.emptied[k][2]).contiguous()
                elif len(b.keys) > 1 or not live.is_contiguous():
                    live.data = live.data.clone(memory_format=torch.contiguous_format)
        self.emptied.clear()

    def reapply(self, change: Callable[[Tensor], Tensor], apply: Callable[[], None]) -> None:
        """Move or cast the live parameters by `apply`, the emptied ones by `change`, and borrow them again."""
        kept = {b.param.name: change(self.weights[b.param.name]) for b, _, _ in self.emptied.values()}
        apply()
        tensors = live_tensors(self.model)
        self.weights.clear()
        for b in self.bindings:
            if b.param.name in kept:
                self.weights[b.param.name] = kept[b.param.name]
            else:
                self._take(b, tensors)


def _is_view(b: Binding, canonical: Tensor) -> bool:
    """Whether the canonical memory can be seen in the stored layout: tried without memory."""
    empty = torch.empty_like(canonical, device="meta")
    return all(t is empty or t._base is empty for t in stored(b, empty))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.device == b.device
