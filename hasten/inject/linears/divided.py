"""A module of which a rank holds a part: its call, and its state, which to everybody else is whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten.inject.linears.matrices import summed
from hasten.inject.linears.plan import Cut, Kind
from hasten.inject.linears.probes import instead, main
from hasten.parallel import Group


class Share:
    """This rank's parts of the parameters that a module has itself.

    The wholes are kept until `settle`, so that `undo` needs nobody; from then on `gather` brings them together, a call
    that all ranks make.
    """

    def __init__(self, module: nn.Module, cuts: Sequence[Cut], group: Group) -> None:
        self.module, self.group = module, group
        self.cuts = {c.name.rpartition(".")[2]: c for c in cuts}
        self.wholes: dict[str, Tensor] = {}
        self.homes: dict[str, torch.device] = {}
        self._handles: list[Any] = []

    def install(self, device: torch.device | None) -> None:
        """Hold the parts, on the device; views of the wholes where those are there already."""
        for name, cut in self.cuts.items():
            p = self.module.get_parameter(name)
            self.wholes[name], self.homes[name] = p.data, p.device
            own = cut.own(p.data, self.group.rank, self.group.size)
            p.data = own.to(device) if device is not None and device != own.device else own
        self._handles = [
            self.module.register_state_dict_post_hook(partial(Share._fill, self)),  # torch marks it
            self.module.register_load_state_dict_pre_hook(self._cut),
        ]

    def settle(self) -> None:
        """Let the wholes go, one at a time."""
        for name in self.cuts:
            p = self.module.get_parameter(name)
            p.data = p.data.clone(memory_format=torch.contiguous_format)
            del self.wholes[name]

    def undo(self) -> None:
        """The parameters as they were, after `install` alone or after `settle`: then by all ranks."""
        for h in self._handles:
            h.remove()
        for name in self.homes:
            p = self.module.get_parameter(name)
            p.data = self.wholes.pop(name) if name in self.wholes else self._gathered(name, p)
        self.homes.clear()

    def _gathered(self, name: str, p: Tensor) -> Tensor:
        """A whole parameter, where it was before it was divided."""
        own = p.detach().contiguous()
        shares = self.group.all_gather(own.flatten()).view(self.group.size, *own.shape)
        return self.cuts[name].join(shares.unbind()).to(self.homes[name])

    def _fill(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in self.cuts:
            if prefix + name in state:
                state[prefix + name] = self._gathered(name, self.module.get_parameter(name))

    def _cut(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, cut in self.cuts.items():
            given, own = state.get(prefix + name), self.module.get_parameter(name)
            whole = [n * (self.group.size if axis == cut.axis else 1) for axis, n in enumerate(own.shape)]
            if isinstance(given, Tensor) and [*given.shape] == whole:  # torch tells of any other shape
                state[prefix + name] = cut.own(given, self.group.rank, self.group.size)


class Meeting:
    """A module's forward at a seam."""

    def __init__(self, module: nn.Module, kind: Kind, group: Group) -> None:
        self.module, self.group, self.kind = module, group, kind
        self.theirs: Callable[..., Any] = module.forward
        self.look: Callable[[Tensor], Tensor] | None = None  # what sees, and may replace, what a call gives

    def install(self) -> None:
        self.module.forward = self.forward  # a bound method: a deep copy takes its own along

    def remove(self) -> None:
        self.module.__dict__.pop("forward", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        match self.kind:
            case "gather":
                met = self.group.all_gather(self.theirs(*args, **kwargs).contiguous())
            case "sum":
                given = self.theirs(*args, **kwargs)
                own = main(given).clone(memory_format=torch.contiguous_format)  # it may be somebody else's memory
                return instead(given, self._seen(self.group.all_reduce(own)))
            case _:
                met = self._summed(next(iter((*args, *kwargs.values()))))
        return self._seen(met)

    def _seen(self, met: Tensor) -> Tensor:
        return met if self.look is None else self.look(met)

    def _summed(self, x: Tensor) -> Tensor:
        """(..., inputs of the rank, or all of them) -> (..., outputs)."""
        own = x.chunk(self.group.size, -1)[self.group.rank] if self.kind == "rows of whole" else x
        return summed(self.module, own, lambda y: self.group.all_reduce(y.contiguous()))
