"""A live model's backbone with its forward replaced, on its own weights.

The module stays where it is, with its parameters, its submodules and its name; only its `forward` is ours. What ours
cannot do in a call goes to the model's own forward, on the same weights, and is counted.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hasten.families.family import Seam
from hasten.inject.calls import CALLS
from hasten.inject.loan import Loan
from hasten.model import Transformer
from hasten.spec import Tower
from hasten.weights import Binding

Arguments = dict[str, Any]


class Backbone:
    """`module` below `model`, taken over for as long as `install` and `remove` say."""

    def __init__(self, model: nn.Module, module: nn.Module, seam: Seam, tower: Tower, bindings: list[Binding]) -> None:
        self.model, self.module, self.seam, self.tower, self.bindings = model, module, seam, tower, bindings
        self.detours: Counter[str] = Counter()  # reason: calls that the model's own forward served
        self.calls = 0
        self.theirs: Callable[..., Any] = module.forward
        self.signature = inspect.signature(self.theirs)
        self.loan: Loan | None = None
        self._handles: list[Any] = []

    @property
    def config(self) -> Any:
        return self.module.config

    def install(self) -> None:
        """Borrow the weights and answer the module's calls."""
        call = CALLS[self.seam.kind]
        self.loan = Loan(self.model, self.bindings)
        self.transformer = Transformer(self.tower, self.loan.weights)
        kept = {id(m) for k in self.seam.keeps for m in _submodule(self.module, k)}
        inner = [m for m in self.module.modules() if m is not self.module and id(m) not in kept]
        self._hooks = [h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = self.arguments(args, kwargs)
            why = self.unfit(arguments, call.knows) or call.unfit(arguments)
            if why is not None:
                return self.detour(why, args, kwargs)
            self.calls += 1
            return call.run(self, arguments)

        self.module.forward = forward
        self.module._apply = self._apply
        self._handles = [
            self.module.register_state_dict_post_hook(lambda *a: self._fill_state(*a)),
            self.module.register_load_state_dict_pre_hook(self._before_load),
            self.module.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self) -> None:
        """Give the weights back and the module its own forward."""
        for h in self._handles:
            h.remove()
        for name in ("forward", "_apply"):
            self.module.__dict__.pop(name, None)
        if self.loan is not None:
            self.loan.give_back()
            self.loan = None

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """A call's arguments by name, those that the signature gathers included."""
        bound = dict(self.signature.bind(*args, **kwargs).arguments)
        for n, p in self.signature.parameters.items():
            if p.kind is p.VAR_KEYWORD:
                bound.update(bound.pop(n, {}))
        return bound

    def unfit(self, arguments: Arguments, known: frozenset[str]) -> str | None:
        """Why the model's own forward has to serve this call, or None."""
        if self.module.training:
            return "the module is in training mode"
        if any(self._hooks) and any(_foreign(f) for h in self._hooks for f in h.values()):
            return "forward hooks on submodules"
        for name, value in arguments.items():
            if name not in known and not (value is None or value is False):
                return f"{name} was given"
        if arguments.get("output_attentions", None) or getattr(self.config, "output_attentions", False):
            return "output_attentions"
        embeds = arguments.get("inputs_embeds")
        if embeds is not None and embeds.requires_grad and torch.is_grad_enabled():
            return "gradients of inputs_embeds"
        return None

    def detour(self, why: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's own forward, on the same weights."""
        assert self.loan is not None
        self.detours[why] += 1
        with self.loan.filled():
            return self.theirs(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`module.to(...)` and its like: the weights move, and are borrowed again."""
        assert self.loan is not None
        self.loan.reapply(fn, lambda: type(self.module)._apply(self.module, fn, recurse) and None)
        self.transformer = Transformer(self.tower, self.loan.weights, self.transformer.backends)
        return self.module

    def _fill_state(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        assert self.loan is not None
        skip = len(self._prefix)
        for k in self.loan.emptied:
            if prefix + k[skip:] in state:
                state[prefix + k[skip:]] = self.loan.whole(k)

    def _before_load(self, *args: Any) -> None:
        assert self.loan is not None
        self._filling = self.loan.filled()
        self._filling.__enter__()

    def _after_load(self, *args: Any) -> None:
        assert self.loan is not None
        for b, _, _ in dict(self.loan.emptied).values():
            self.loan.refresh(b)
        self._filling.__exit__(None, None, None)

    @property
    def _prefix(self) -> str:
        name = next(n for n, m in self.model.named_modules() if m is self.module)
        return f"{name}." if name else ""


def _submodule(module: nn.Module, path: str) -> list[nn.Module]:
    found = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return []
    return list(found.modules())


def _foreign(hook: Callable[..., Any]) -> bool:
    """Whether a hook is the user's: transformers' own only record outputs, which our calls give themselves."""
    return not (getattr(hook, "__module__", "") or "").startswith("transformers.")
