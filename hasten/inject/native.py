"""Native generation for one live backbone: the runtime's generator, made when it is first asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from hasten.inject.backbone import Backbone
from hasten.runtime import Event, Generation, Generator, Sampling
from hasten.runtime.graphs import Unrecordable

T = TypeVar("T")


class Native:
    """Generates on a backbone's weights, as they are at each call.

    limit: tokens that a prompt and its completion may have together. graphs: decode steps may be recorded. invariant:
    as the option batch_invariant says. One caller at a time is served; a copy of the model makes its own generator.
    """

    def __init__(self, backbone: Backbone, *, limit: int | None, graphs: bool, invariant: bool = False) -> None:
        self.backbone, self.limit, self.graphs, self.invariant = backbone, limit, graphs, invariant
        self._begin()

    def _begin(self) -> None:
        self._generator: Generator | None = None
        self._for: tuple[object, object] = (None, None)  # transformer and tokenizer of the generator
        self.lock = threading.RLock()
        self.streams = 0  # that have begun and are not over

    def __getstate__(self) -> dict[str, Any]:
        kept = ("backbone", "limit", "graphs", "invariant")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __str__(self) -> str:
        """How decode steps run, as far as is known."""
        decoder = None if self._generator is None else self._generator.decoding
        return "nothing has been generated natively yet" if decoder is None else decoder

    def generate(self, prompts: Any, how: Sampling | Sequence[Sampling], ends: Any, tokenizer: Any) -> list[Generation]:
        """`Generator.generate`; ends: token ids that stop every completion."""
        with self.lock, torch.inference_mode():
            return self._generator_for(tokenizer, ends).generate(prompts, how)

    def stream(self, prompts: Any, how: Sampling | Sequence[Sampling], ends: Any, tokenizer: Any) -> Iterator[Event]:
        """`Generator.stream`; what is wrong with the request is said at once."""
        return self._counted(self._generator_for(tokenizer, ends).stream(prompts, how))

    def tokens(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Event]:
        """The events of token ids alone, by whatever generator there is: `how` has to name the tokens that stop."""
        if self._generator is None or self._for[0] is not self.backbone.transformer:
            self._generator_for(None, ())
        assert self._generator is not None
        return self._generator.stream(prompts, how)

    def prepare(self, sequences: int, tokens: int, how: Sampling | None, ends: Any, tokenizer: Any) -> None:
        """`Generator.prepare`."""
        with self.lock:
            self._generator_for(tokenizer, ends).prepare(sequences, tokens, how)

    def close(self) -> None:
        """Give back the memory of keys and values."""
        if self._generator is not None:
            self._generator.close()
            self._generator = None

    def _counted(self, events: Iterator[T]) -> Iterator[T]:
        self.streams += 1
        try:
            yield from events
        finally:
            self.streams -= 1

    def _generator_for(self, tokenizer: Any, ends: Any) -> Generator:
        transformer = self.backbone.transformer
        if self._generator is None or self._for != (transformer, tokenizer):
            self.close()
            unrecorded = not self.graphs and transformer.like.is_cuda
            recorder = Unrecorded() if unrecorded else None
            self._generator = Generator(
                transformer,
                eos=ends,
                tokenizer=tokenizer,
                max_tokens=self.limit,
                recorder=recorder,
                invariant=self.invariant,
            )
            self._for = (transformer, tokenizer)
        return self._generator


class Unrecorded:
    """Records nothing, since the user has said so."""

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        raise Unrecordable("enable_cuda_graph=False")

    def steps(self, seconds: float | None) -> int:
        return 1
