"""Generation: prompts in, completions out, all of them at once or token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

from hasten.errors import RequestError
from hasten.model import Transformer
from hasten.runtime.pages import Pages
from hasten.runtime.prompts import Bounds, requests
from hasten.runtime.request import Chosen, Event, FinishReason, Generation, Request, Sampling, Transcript, is_token
from hasten.runtime.runner import Runner
from hasten.runtime.scheduler import Scheduler
from hasten.runtime.scheduler import Sequence as Line
from hasten.runtime.text import Tokenizer, Voice
from hasten.spec import Tokens

Samplings = Sampling | Sequence[Sampling] | None


class Generator:
    """Native generation for one decoder, with memory of its own; another one in the process knows nothing of it.

    eos: token ids that end every completion. page_size: tokens in a page. memory_limit: bytes that keys and values may
    take, half of what is free now if not given; they take what they need, and keep it until `close`. max_tokens: of a
    prompt and its completion. budget: tokens that go through the model at once.
    """

    def __init__(
        self,
        transformer: Transformer,
        *,
        eos: Iterable[int] | int = (),
        tokenizer: Tokenizer | None = None,
        page_size: int = 16,
        memory_limit: int | None = None,
        max_tokens: int | None = None,
        budget: int = 512,
    ) -> None:
        given = {"page_size": page_size, "memory_limit": memory_limit, "max_tokens": max_tokens, "budget": budget}
        wrong = [f"{k}={v!r}" for k, v in given.items() if v is not None and (not is_token(v) or v < 1)]
        if wrong:
            raise RequestError(f"{', '.join(wrong)}: not an integer of at least 1")
        self._runner = Runner(transformer, page_size=page_size, memory_limit=memory_limit)
        self._pages = Pages(self._runner.pools.limit)
        self._ends = frozenset([eos] if isinstance(eos, int) else eos)
        self._tokenizer, self._budget = tokenizer, budget
        self._bounds = _bounds(transformer, max_tokens)
        self._closed = False

    @property
    def memory(self) -> int:
        """Bytes that keys and values take now."""
        return self._runner.pools.bytes

    def generate(self, prompts: Iterable[Any], sampling: Samplings = None) -> list[Generation]:
        """Completions in the order of their prompts, those of one prompt (`Sampling.n`) side by side.

        prompts: lists or tensors of token ids, or strings where there is a tokenizer. sampling: one for all, or one
        each. A prompt that the memory limit could never hold comes back "rejected"; anything else that is wrong raises
        RequestError before a token is made.
        """
        made = self._requests(prompts, sampling)
        scripts = {(r.index, sample): Transcript(r, sample) for r in made for sample in range(r.sampling.n)}
        for event in self._events(made):
            scripts[event.index, event.sample].events.append(event)
        return [script.generation() for script in scripts.values()]

    def stream(self, prompts: Iterable[Any], sampling: Samplings = None) -> Iterator[Event]:
        """The events of `generate`, each as soon as its token is there. Dropping the iterator frees its pages."""
        return self._events(self._requests(prompts, sampling))

    def close(self) -> None:
        """Give back the memory of keys and values; the generator cannot be used any more, the model can."""
        self._closed = True
        self._runner.clear()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _requests(self, prompts: Iterable[Any], sampling: Samplings) -> list[Request]:
        self._check_open()
        return requests(prompts, sampling, self._bounds, ends=self._ends, tokenizer=self._tokenizer)

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("this generator is closed")

    def _events(self, made: list[Request]) -> Iterator[Event]:
        scheduler = Scheduler(
            self._pages,
            self._runner.pools.page_size,
            self._budget,
            restarts=self._runner.restarts,
            promise=self._runner.device.type == "cpu",
        )
        voices: dict[Line, Voice | None] = {}
        try:
            for line in (Line(r, sample) for r in made for sample in range(r.sampling.n)):
                voices[line] = self._voice(line.request)
                try:
                    scheduler.add(line)
                except RequestError as refusal:
                    yield _rejection(line, voices[line], str(refusal))
            while scheduler.running or scheduler.waiting:
                yield from self._pass(scheduler, voices)
        finally:
            scheduler.clear()

    def _pass(self, scheduler: Scheduler, voices: dict[Line, Voice | None]) -> list[Event]:
        """One pass through the model, and what came of it."""
        self._check_open()
        rows = scheduler.next()
        if not rows:
            raise RequestError(
                f"{len(scheduler.waiting)} sequences wait for pages, of which other streams of this generator hold "
                f"{self._pages.limit - self._pages.free} of {self._pages.limit}: finish those first"
            )
        chosen = self._runner.run(rows)
        scheduler.advance(rows)
        lines, events = [row.sequence for row in rows if row.samples], []
        for line, c in zip(lines, chosen, strict=True):
            line.tokens.append(c.token)
            event = _event(line, c, voices[line])
            if event.finish_reason:
                scheduler.finish(line)
            events.append(event)
        return events

    def _voice(self, r: Request) -> Voice | None:
        return None if self._tokenizer is None else Voice(self._tokenizer, r.prompt, r.sampling.stop)


def _event(line: Line, c: Chosen, voice: Voice | None) -> Event:
    r, text = line.request, None
    reason: FinishReason | None = None
    if c.token in r.ends:
        reason = "stop"
    elif len(line.tokens) >= r.limit:
        reason = "length"
    if voice is not None:
        text = "" if reason == "stop" else voice.say(c.token)
        text += voice.end() if reason else ""
        reason = "stop" if voice.stopped else reason
    return Event(r.index, line.sample, c.token, text, c.logprob, c.likeliest, reason)


def _rejection(line: Line, voice: Voice | None, why: str) -> Event:
    text = None if voice is None else ""
    return Event(line.request.index, line.sample, None, text, finish_reason="rejected", error=why)


def _bounds(model: Transformer, max_tokens: int | None) -> Bounds:
    e = model.tower.embed
    assert isinstance(e, Tokens), "the runner has refused other towers"
    rows = None if e.positions is None else e.positions - e.position_offset
    return Bounds(e.vocab, rows, max_tokens)
