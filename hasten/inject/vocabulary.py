"""Tables of the vocabulary of which every rank holds equally many rows, and the model's own modules that read them.

The table of tokens and the head are modules of the live model, which its own code calls. Their `forward` on the
instance computes what this rank has the rows for, and the ranks put it together; the stage that has the table tells the
others. Whoever wants the tables themselves (state_dict, load_state_dict, a detour) gets them whole, as everything else
that ranks divide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.errors import RequestError
from hasten.inject.joining import Division
from hasten.inject.loan import Loan
from hasten.parallel import Group, exchanged
from hasten.weights import Binding

if TYPE_CHECKING:
    from hasten.inject.backbone import Backbone

RESIZE = "resize_token_embeddings"


def leavable(model: nn.Module, backbones: Sequence[Backbone]) -> frozenset[str]:
    """Slots that a stage can do without: of one backbone, where modules of torch's read them."""
    slots = frozenset({"tokens", "head"})
    return slots if len(backbones) == 1 and _plain(model, backbones[0], slots) else frozenset()


def divisible(model: nn.Module, backbones: Sequence[Backbone]) -> frozenset[str]:
    """Slots of which ranks can hold rows each: the head's, of one decoder whose tables modules of torch's read.

    Looking tokens up in a divided table takes an exchange, and saves memory but no time: so that is divided where it is
    the head's too.
    """
    head = backbones[0].tower.head if len(backbones) == 1 and backbones[0].seam.kind == "decoder" else None
    if head is None:
        return frozenset()
    slots = frozenset({"tokens", "head"} if head.tied else {"head"})
    return slots if _plain(model, backbones[0], slots) else frozenset()


def _plain(model: nn.Module, backbone: Backbone, slots: frozenset[str]) -> bool:
    readers = [m for m, _, _ in _readers(model, backbone.bindings, slots)]
    return all(isinstance(m, nn.Linear | nn.Embedding) and "forward" not in vars(m) for m in readers)


def _readers(
    model: nn.Module, bindings: Sequence[Binding], slots: frozenset[str]
) -> Iterator[tuple[nn.Module, str, Binding]]:
    """Every module that has a table, which may be tied, or a bias of the vocabulary, and under what name."""
    for b in bindings:
        if b.param.role == "vocab" and b.param.slot in slots:
            path, _, name = b.keys[0].rpartition(".")
            t = model.get_submodule(path)._parameters[name]
            yield from ((m, n, b) for m in model.modules() for n, p in m._parameters.items() if p is t)


class Vocabulary:
    """The readers of one backbone's divided tables, replaced between `install` and `remove`."""

    def __init__(self, backbone: Backbone, division: Division) -> None:
        self.model, loan, group = backbone.model, backbone.loan, division.group
        assert loan is not None
        readers: dict[int, Reader] = {}
        for m, n, b in _readers(self.model, backbone.bindings, division.vocabulary | division.leaving):
            readers.setdefault(id(m), Reader(m, group, loan)).held[n] = b
        inside = set(backbone.module.modules())
        self.readers = tuple(readers.values())
        self._outside = [r for r in self.readers if r.module not in inside]  # of the others the backbone's hooks know
        self._handles: list[Any] = []

    def __contains__(self, module: nn.Module) -> bool:
        return any(r.module is module for r in self.readers)

    def install(self) -> None:
        # bound methods: a copy of the model takes its own along
        for r in self.readers:
            r.module.forward = r.forward
        for r in self._outside:
            self._handles += [
                r.module.register_state_dict_post_hook(partial(Reader.fill_state, r)),
                r.module.register_load_state_dict_pre_hook(r.before_load),
                r.module.register_load_state_dict_post_hook(r.after_load),
            ]
        if hasattr(self.model, RESIZE):
            self.model.__dict__[RESIZE] = self._refuse

    def remove(self) -> None:
        for h in self._handles:
            h.remove()
        for r in self.readers:
            r.module.__dict__.pop("forward", None)
        self.model.__dict__.pop(RESIZE, None)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RequestError(
            f"{RESIZE}: every rank holds some rows of the vocabulary. Call revert() of the engine, resize, and call "
            "init_inference again"
        )


class Reader:
    """A module that reads this rank's rows: an Embedding of some ids, or a Linear that gives some logits.

    held: the names of its divided parameters. Where they are whole, as in a detour, its own forward serves. Where not
    every stage holds them, one that does tells the others what it gives.
    """

    def __init__(self, module: nn.Module, group: Group, loan: Loan) -> None:
        self.module, self.group, self.loan = module, group, loan
        self.held: dict[str, Binding] = {}

    def forward(self, input: Tensor) -> Tensor:
        stages, table = self.loan.held, self.held["weight"]
        if stages is None or not stages.apart(table):
            return self._read(input)
        given = self._read(input) if stages.here(table) else self._unread(input, table)
        return exchanged(given, partial(stages.told, table))

    def _unread(self, input: Tensor, table: Binding) -> Tensor:
        """What another stage's `_read` will be like."""
        embeds = isinstance(self.module, nn.Embedding)
        shape = (*input.shape, table.param.columns[-1]) if embeds else (*input.shape[:-1], table.param.shape[0])
        return self.loan.model.get_parameter(table.keys[0]).detach().new_empty(shape)

    def _read(self, input: Tensor) -> Tensor:
        m: Any = self.module
        vocab, rows = sum(self.held["weight"].param.parts), len(m.weight)
        if rows == vocab:
            return type(m).forward(m, input)
        if isinstance(m, nn.Embedding):
            return self._looked_up(m, input, rows, vocab)
        return self.group.all_gather(type(m).forward(m, input))[..., :vocab]

    def _looked_up(self, m: nn.Embedding, ids: Tensor, rows: int, vocab: int) -> Tensor:
        if ids.device.type == "cpu" and bool(((ids < 0) | (ids >= vocab)).any()):
            raise IndexError(f"ids must be from 0 to {vocab - 1}")
        own = ids - self.group.rank * rows
        mine = (own >= 0) & (own < rows)
        found = type(m).forward(m, own.clamp(0, rows - 1))
        return self.group.all_reduce(torch.where(mine[..., None], found, 0.0))

    def fill_state(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for n, b in self.held.items():
            for key, whole in self.loan.wholes(b.keys.__contains__) if prefix + n in state else ():
                state[prefix + n] = self.loan.at_home(key, whole)

    def before_load(self, module: nn.Module, *args: Any) -> None:
        for n, b in self.held.items():
            for _, whole in self.loan.wholes(b.keys.__contains__):
                getattr(module, n).data = whole

    def after_load(self, module: nn.Module, *args: Any) -> None:
        for n, b in self.held.items():
            if b.keys[0] in self.loan.emptied:
                self.loan.refresh(b)
                live = getattr(module, n)
                live.data = self.loan.resting(b, live)
