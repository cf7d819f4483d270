"""A replay that is begun on the guess that a call is like the last one; what the call is, is found out while it runs.

To look at a call's arguments, at the options that it runs under and at the modules that it stands for takes the host
longer than all else that a replay needs of it, above all where no cache holds what it looks at. A wrong guess costs
time and nothing else: a replay writes only memory of the recording, a note keeps alive what it reads, and the answer is
taken from it only where the call turns out to have the recording's key and the inputs that were copied.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hasten.inject.captured import Graphs, Lane, Recording, Tensors

MOST = 16  # notes of one model
_guess: ContextVar[Guess | None] = ContextVar("guess", default=None)


@dataclass(frozen=True, slots=True)
class Note:
    """A call that was replayed, so that another which looks the same can be begun."""

    sources: tuple[str | None, ...]  # names of the arguments that were the recording's inputs
    key: Hashable
    recording: Recording
    lane: Lane
    stream: Hashable
    kept: tuple[Tensor, ...]  # shares the memory of what the recording reads besides, which so stays readable


class Guess:
    """Around a call: begins the replay that `graphs` has a note of, if the arguments look like it."""

    def __init__(self, graphs: Graphs, arguments: Mapping[str, Any], checked: bool) -> None:
        self.graphs, self.arguments, self.checked = graphs, arguments, checked
        self.looks = checked, *((n, _look(v)) for n, v in arguments.items())
        self._begun: tuple[Note, Tensors] | None = None
        self._token: Token[Guess | None] | None = None

    def __enter__(self) -> Guess:
        self._token = _guess.set(self)
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        note = self.graphs.notes.get(self.looks)
        if note is not None and not torch.is_grad_enabled():  # a copy of what wants a gradient would be a part of it
            inputs = tuple(None if n is None else self.arguments[n] for n in note.sources)
            if self.graphs.stream(inputs) == note.stream:
                note.lane.lock.acquire()
                self._begun = note, inputs
                note.recording.begin(inputs)

    def __exit__(self, *error: object) -> None:
        assert self._token is not None
        _guess.reset(self._token)
        self.wrong()

    def wrong(self) -> None:
        """Whatever was begun is not what the call is, and the next one that looks like it is not guessed."""
        if self._begun is not None:
            self._begun[0].lane.lock.release()
            self._begun = None
            self.graphs.notes.pop(self.looks, None)

    def right(self, key: Hashable, inputs: Tensors) -> bool:
        """Whether the call under this key with these inputs has been begun; it is then the caller's to end."""
        if self._begun is None:
            return False
        note, copied = self._begun
        if note.key != key or any(map(_differ, copied, inputs)):
            self.wrong()
            return False
        self._begun = None
        note.lane.lock.release()  # the caller has it too
        return True

    def learn(self, key: Hashable, inputs: Tensors, recording: Recording, lane: Lane, kept: tuple[Tensor, ...]) -> None:
        """Note a replay whose inputs are arguments as they were given, each of them one and no other."""
        given = {n: v for n, v in self.arguments.items() if isinstance(v, Tensor)}
        found = [[n for n, v in given.items() if not _differ(v, t)] for t in inputs if t is not None]
        if any(len(names) != 1 for names in found) or any(t is not None and not t.is_contiguous() for t in inputs):
            return
        names = iter(found)
        sources = tuple(None if t is None else next(names)[0] for t in inputs)
        notes = self.graphs.notes
        while len(notes) >= MOST:
            notes.pop(next(iter(notes)), None)
        notes[self.looks] = Note(sources, key, recording, lane, self.graphs.stream(inputs), kept)


def current(graphs: Graphs) -> Guess | None:
    """The guess around the current call of the model whose recordings these are."""
    guess = _guess.get()
    return guess if guess is not None and guess.graphs is graphs else None


def let_go(graphs: Graphs | None) -> None:
    """The current call is no replay, and nobody should wait for it."""
    guess = None if graphs is None else current(graphs)
    if guess is not None:
        guess.wrong()


def _look(value: object) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.get_device(), value.is_contiguous()
    return value if value is None or isinstance(value, bool) else value.__class__


def _differ(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are not the same numbers in the same memory."""
    if a is None or b is None:
        return a is not b
    return a is not b and (a.data_ptr() != b.data_ptr() or a.stride() != b.stride() or _look(a) != _look(b))
