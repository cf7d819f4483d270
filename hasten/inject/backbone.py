"""A live model's backbone with its forward replaced, on its own weights.

The module stays where it is, with its parameters, its submodules and its name; only its `forward` is ours. What ours
cannot do in a call goes to the model's own forward, on the same weights, and is counted.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count, repeat
from operator import contains
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.errors import RequestError
from hasten.families.family import Seam
from hasten.inject.ahead import pending, settle
from hasten.inject.calls import CALLS
from hasten.inject.captured import Graphs
from hasten.inject.early import Guess, current, let_go
from hasten.inject.held import held
from hasten.inject.hf_cache import CACHE, heads, spelled
from hasten.inject.joining import Division
from hasten.inject.loan import Loan
from hasten.inject.vocabulary import Vocabulary
from hasten.model import Transformer
from hasten.parallel import ALONE
from hasten.spec import Tokens, Tower
from hasten.weights import Binding, local, part, renamed

if TYPE_CHECKING:
    from hasten.inject.watch import Watch

Arguments = dict[str, Any]


class Backbone:
    """`module` below `model`, taken over for as long as `install` and `remove` say."""

    def __init__(self, model: nn.Module, module: nn.Module, seam: Seam, tower: Tower, bindings: list[Binding]) -> None:
        self.model, self.module, self.seam, self.tower, self.bindings = model, module, seam, tower, bindings
        self.detours: Counter[str] = Counter()  # reason: calls that the model's own forward served
        self.calls = 0
        self.bypass: str | None = None  # why every call goes to the model's own forward, if it does
        self.watch: Watch | None = None  # who looks on during a probe
        self.theirs: Callable[..., Any] = module.forward
        self.signature = inspect.signature(self.theirs)
        self._spelling = Spelling(self.signature)
        self.path = next(n for n, m in model.named_modules() if m is module)  # of the module in the model
        self.loan: Loan | None = None
        self.here = range(len(tower.blocks))  # the blocks of this stage
        self.division: Division | None = None
        self.graphs: Graphs | None = None
        self.skip_padding = False
        self._handles: list[Any] = []
        self.vocabulary: Vocabulary | None = None

    @property
    def config(self) -> Any:
        return getattr(self.module, "config", None)

    def lend(self, division: Division | None = None, shares: Mapping[tuple[str, ...], Tensor] | None = None) -> None:
        """Stand ready for `install`, and for `remove`, which all ranks among whom layers are divided make together.

        shares: what this rank has read of them, by the names of the live parameters.
        """
        self.division = division
        self.here = range(len(self.tower.blocks)) if division is None else division.blocks(self.tower)
        self.loan = Loan(self.model, self.bindings, division, shares, held(self.tower, self.bindings, division))

    def install(self, backend: str | None = None, graphs: bool = True, skip_padding: bool = False) -> None:
        """Borrow the weights and answer the module's calls; `backend` forces one for every op.

        graphs: calls of encoders that repeat themselves on a GPU may be recorded. skip_padding: as the option says.
        """
        if self.loan is None:
            self.lend()
        assert self.loan is not None
        self.skip_padding = skip_padding
        self.call = CALLS[self.seam.kind]
        division = self.division
        staged = division is not None and division.place.chain is not None  # what they exchange is in no recording
        self.graphs = Graphs() if graphs and not staged else None
        own = self.tower
        if division is not None:
            own = part(local(own, division.group.rank, division.group.size, division.experts), self.here)
        self.loan.take()
        everywhere = {} if backend is None else dict.fromkeys(range(len(own.blocks)), backend)
        place = ALONE if division is None else division.place
        self.transformer = Transformer(own, self._lent(), everywhere, place)
        self._inner = [m for n, m in self.module.named_modules() if n and not self.seam.kept(n)]
        self._hooks = [h for m in self._inner for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = Attributes([] if self.tower.causal else self._inner)  # a decoder's step would feel that search
        self.attentions = frozenset(block.attention for block in own.blocks)

        # bound methods, not closures: a deep copy of the model then takes its own backbone along
        self.module.__dict__["_hasten"] = self
        self.module.forward = self.forward
        self.module._apply = self._apply
        self._handles = [
            self.module.register_state_dict_post_hook(partial(Backbone._fill_state, self)),
            self.module.register_load_state_dict_pre_hook(self._before_load),
            self.module.register_load_state_dict_post_hook(self._after_load),
        ]
        if division is not None and (division.vocabulary or division.leaving):
            self.vocabulary = Vocabulary(self, division)
            self.vocabulary.install()
            self._own = Attributes([m for m in self._own.modules if m not in self.vocabulary])

    def remove(self) -> None:
        """Give the weights back and the module its own forward."""
        for h in self._handles:
            h.remove()
        if self.vocabulary is not None:
            self.vocabulary.remove()
        for name in ("forward", "_apply", "_hasten"):
            self.module.__dict__.pop(name, None)
        if self.loan is not None:
            if self.graphs is not None:
                self.graphs.clear()
            self.__dict__.pop("transformer", None)  # it holds the canonical tensors, which are to go one by one
            self.loan.give_back()
            self.loan = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module answers: ours where it can, else the model's own."""
        with self.guess(args, kwargs, pending()):
            return self._answer(args, kwargs)

    def guess(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], checked: bool) -> AbstractContextManager[Any]:
        """Around a call with these arguments: begins what such a call was before. checked: whether ids are."""
        if self.graphs is None or not self.call.ahead or current(self.graphs) is not None:
            return nullcontext()
        arguments = self.arguments(args, kwargs)
        ids = isinstance(self.tower.embed, Tokens) and arguments.get("input_ids") is not None
        return Guess(self.graphs, arguments, checked and ids)

    def _answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        arguments = self.arguments(args, kwargs)
        why = self.unfit(arguments, self.call.knows) or self.call.unfit(arguments)
        if why is not None:
            let_go(self.graphs)
            return self.detour(why, args, kwargs)
        if not self.call.ahead:
            settle()
        self._check_cache(arguments, None)
        self.calls += 1
        return self.call.run(self, arguments)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """A call's arguments by name, those that the signature gathers included."""
        return spelled(self._spelling(args, kwargs))

    def unfit(self, arguments: Arguments, known: frozenset[str]) -> str | None:
        """Why the model's own forward has to serve this call, or None."""
        if self.bypass is not None:
            return self.bypass
        if self.module.training:
            return "the module is in training mode"
        if arguments.get("output_attentions", None) or getattr(self.config, "output_attentions", False):
            return "output_attentions"
        if any(self._hooks) and any(foreign(f) for h in self._hooks for f in h.values()):
            return "forward hooks on submodules"
        tracked = torch.is_grad_enabled()
        for name, value in arguments.items():
            if name not in known and not (value is None or value is False):
                return f"{name} was given"
            if tracked and isinstance(value, Tensor) and value.requires_grad:
                return f"gradients of {name}"
        if not isinstance(arguments.get("output_hidden_states"), bool | None):
            return "output_hidden_states chooses layers"
        if self.division is not None and any(_by_head(v) for n, v in arguments.items() if n.endswith("mask")):
            return "a mask for each head"
        if self._own.any("forward"):  # so transformers 4 records the states of some models
            return "replaced forwards of submodules"
        return None

    def detour(self, why: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's own forward, on the same weights."""
        assert self.loan is not None
        settle()
        self._check_cache(self.arguments(args, kwargs), why)
        self.detours[why] += 1
        with self.loan.filled():
            output = self.theirs(*args, **kwargs)
        if self.watch is not None:
            self.watch.last["original"] = self.call.hidden(self, output)
        return output

    def _check_cache(self, arguments: Arguments, detour: str | None) -> None:
        """RequestError for a cache of one rank's part in a call that makes a detour, or a whole one in one of ours."""
        if self.division is None:
            return
        layers, at = (self.tower.blocks, count()) if detour else (self.transformer.tower.blocks, iter(self.here))
        found = heads(arguments.get(CACHE))
        for i, attention in zip(at, (b.attention for b in layers), strict=False):
            needed = attention.kv_heads, attention.head_dim
            held = found.get(i, needed)
            if held != needed:
                lacks = f"{held[0]} key-value heads" if held[1] == needed[1] else "the layers of one stage"
                goes = f"goes to the model's own forward ({detour})" if detour else "is the fused backbone's"
                raise RequestError(
                    f"the cache holds {lacks}, and this call needs {needed[0]} in every layer, since it {goes}: that "
                    "one keeps all heads of all layers, and the fused backbone those of its rank. Begin with a new "
                    "cache where calls change"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`module.to(...)` and its like: the weights move, and are borrowed again."""
        assert self.loan is not None
        self.loan.reapply(fn, lambda: type(self.module)._apply(self.module, fn, recurse) and None)
        if self.graphs is not None:
            self.graphs.clear()
        t = self.transformer
        self.transformer = Transformer(t.tower, self._lent(), t.backends, t.place)
        return self.module

    def _lent(self) -> Mapping[str, Tensor]:
        """The weights by the names that they have in the tower that is computed here."""
        assert self.loan is not None
        w = self.loan.weights
        return w if self.loan.held is None else renamed(w, self.here)

    def _fill_state(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        assert self.loan is not None
        skip = len(self.path) + 1 if self.path else 0
        for k, whole in self.loan.wholes(lambda k: prefix + k[skip:] in state):
            state[prefix + k[skip:]] = self.loan.at_home(k, whole)

    def _before_load(self, *args: Any) -> None:
        assert self.loan is not None
        self._filling = self.loan.filled()
        self._filling.__enter__()

    def _after_load(self, *args: Any) -> None:
        assert self.loan is not None
        for b in {id(b): b for b, _, _ in self.loan.emptied.values()}.values():
            self.loan.refresh(b)
        self.__dict__.pop("_filling").__exit__(None, None, None)


class Spelling:
    """Arguments by name, as a signature binds them, those that it gathers included; ten times as fast as `bind`."""

    def __init__(self, signature: inspect.Signature) -> None:
        self.signature = signature
        self._gathers = next((n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
        named = {n: p for n, p in signature.parameters.items() if n != self._gathers}
        self._positional = tuple(n for n, p in named.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
        self._names = frozenset(n for n, p in named.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        self._needed = frozenset(n for n, p in named.items() if p.default is p.empty)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        bound = dict(zip(self._positional, args, strict=False), **kwargs)
        whole = len(bound) == len(args) + len(kwargs) and bound.keys() >= self._needed
        if whole and (self._gathers is not None or bound.keys() <= self._names):
            return bound
        bound = dict(self.signature.bind(*args, **kwargs).arguments)  # raises, or it is a signature of a rarer kind
        if self._gathers is not None:
            bound.update(bound.pop(self._gathers, {}))
        return bound


class Attributes:
    """What modules hold on their instances, looked up in all of them in a few microseconds."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self._held = [m.__dict__ for m in modules]

    def __reduce__(self) -> Any:
        return type(self), (self.modules,)  # a deep copy of a module has a dict that no copy of its own dict is

    def any(self, name: str) -> bool:
        return any(map(contains, self._held, repeat(name)))


def _by_head(mask: Any) -> bool:
    """Whether a mask (batch, heads, queries, keys) says something else to each head."""
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] > 1


def foreign(hook: Callable[..., Any]) -> bool:
    """Whether a hook is the user's: transformers' own only record outputs, which our calls give themselves."""
    return not (getattr(hook, "__module__", "") or "").startswith("transformers.")
