"""Generation: prompts in, completions out, all of them at once or token by token."""

from __future__ import annotations

import collections.abc
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from hasten.errors import RequestError
from hasten.model import Transformer
from hasten.runtime.graphs import Recorder
from hasten.runtime.passes import Pass
from hasten.runtime.prompts import Bounds, requests
from hasten.runtime.request import Event, Generation, Request, Sampling, is_token
from hasten.runtime.runner import Runner
from hasten.runtime.runs import MOST_TOKENS
from hasten.runtime.said import Said, Transcript, events, hear
from hasten.runtime.sampler import columns
from hasten.runtime.scheduler import Row, Scheduler
from hasten.runtime.scheduler import Sequence as Line
from hasten.runtime.text import Tokenizer, Voice
from hasten.spec import Tokens

BUDGET = {"cuda": MOST_TOKENS}
"""Tokens that go through the model at once where nobody says: enough to keep the device at its speed; 512 elsewhere."""

Samplings = Sampling | Sequence[Sampling] | None
Voices = dict[Line, Voice | None]
Answers = collections.abc.Generator[list[Said], None, None]


class Generator:
    """Native generation for one decoder, with memory of its own; another one in the process knows nothing of it.

    eos: token ids that end every completion. page_size: tokens in a page. memory_limit: bytes that keys and values may
    take, half of what is free now if not given; they take what they need, and keep it until `close`. max_tokens: of a
    prompt and its completion. budget: tokens that go through the model at once. recorder: how decode steps are recorded
    as a whole; what the device offers if not given. invariant: what comes of a request is the same to the bit whatever
    runs beside it; a model for which that cannot be is a RequestError.
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
        budget: int | None = None,
        recorder: Recorder | None = None,
        invariant: bool = False,
    ) -> None:
        given = {"page_size": page_size, "memory_limit": memory_limit, "max_tokens": max_tokens, "budget": budget}
        wrong = [f"{k}={v!r}" for k, v in given.items() if v is not None and not _counts(v)]
        if wrong:
            raise RequestError(f"{', '.join(wrong)}: not an integer of at least 1")
        self._runner = Runner(
            transformer, page_size=page_size, memory_limit=memory_limit, recorder=recorder, invariant=invariant
        )
        self._ends = frozenset([eos] if isinstance(eos, int) else eos)
        self._tokenizer, self._budget = tokenizer, budget or BUDGET.get(self._runner.device.type, 512)
        self._bounds = _bounds(transformer, max_tokens)
        self._closed = False

    @property
    def memory(self) -> int:
        """Bytes that keys and values take now."""
        return self._runner.pools.bytes

    @property
    def decoding(self) -> str:
        """How decode steps run here, for people."""
        decoder = self._runner.decoder
        return "decode steps run launch by launch" if decoder is None else str(decoder)

    def generate(self, prompts: Iterable[Any], sampling: Samplings = None) -> list[Generation]:
        """Completions in the order of their prompts, those of one prompt (`Sampling.n`) side by side.

        prompts: lists or tensors of token ids, or strings where there is a tokenizer. sampling: one for all, or one
        each. A prompt that the memory limit could never hold comes back "rejected"; anything else that is wrong raises
        RequestError before a token is made.
        """
        made = self._requests(prompts, sampling)
        lines = self._lines(made)
        scripts = {line: Transcript(line, voice is not None) for line, voice in lines.items()}
        # the longest first: sequences that end together leave no long ones behind that run by themselves
        ordered = sorted(lines, key=lambda line: line.request.sampling.max_new_tokens, reverse=True)
        for passed in self._passes({line: lines[line] for line in ordered}):
            for said in passed:
                scripts[said.line].add(said)
        return [script.generation() for script in scripts.values()]

    def stream(self, prompts: Iterable[Any], sampling: Samplings = None) -> Iterator[Event]:
        """The events of `generate`, each as soon as its token is there. Dropping the iterator frees its pages."""
        return self._events(self._lines(self._requests(prompts, sampling)))

    def prepare(self, sequences: int, tokens: int, sampling: Sampling | None = None) -> None:
        """Take the memory and make the records that calls of this size need, so that none has to stop for them.

        sequences: prompts of a call, or of streams at once. tokens: of a prompt and its completion, at most. sampling:
        how they choose, greedily if not given; others that choose alike are served too. On a CPU nothing is recorded.
        """
        self._check_open()
        given = {"sequences": sequences, "tokens": tokens}
        wrong = [f"{k}={v!r} is not an integer of at least 1" for k, v in given.items() if not _counts(v)]
        wrong = wrong or [f"tokens={tokens}, but {why}" for most, why in self._bounds.room() if tokens > most]
        if wrong:
            raise RequestError(f"prepare: {'; '.join(wrong)}")
        line = Line(Request(0, (0,), sampling or Sampling(), 0))
        self._runner.prepare(sequences, tokens, self._budget, columns([line]))

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
        made = requests(prompts, sampling, self._bounds, ends=self._ends, tokenizer=self._tokenizer)
        over = self._runner.model.place.everyone
        if over is None or all(r.sampling.greedy or r.sampling.seed is not None for r in made):
            return made
        return [replace(r, seed=seed) for r, seed in zip(made, over.share([r.seed for r in made]), strict=True)]

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("this generator is closed")

    def _lines(self, made: list[Request]) -> Voices:
        return {Line(r, sample): self._voice(r) for r in made for sample in range(r.sampling.n)}

    def _events(self, lines: Voices) -> Iterator[Event]:
        passes = self._passes(lines)
        try:
            for passed in passes:
                for event in events(passed):
                    self._check_open()
                    yield event
        finally:
            passes.close()

    def _passes(self, lines: Voices) -> Answers:
        """What came of one pass after the other, rejections first."""
        scheduler = self._runner.scheduler(self._budget)
        try:
            self._runner.reserve([scheduler.most(line) for line in lines])
            yield [said for line, voice in lines.items() if (said := _rejected(scheduler, line, voice)) is not None]
            if self._runner.lanes > 1:
                yield from self._in_lanes(scheduler, lines)
                return
            work: Pass | None = None
            while work or scheduler.running or scheduler.waiting:
                self._check_open()
                work = work or self._start(scheduler, scheduler.next())
                if work is None:
                    raise RequestError(_starved(scheduler))
                # |---- on the device: work, then next ----|   while the host hears of `work`, and tells of it
                rows = [] if self._runner.decoder is None else scheduler.next()
                following = self._follow(scheduler, work, rows)
                said = _settle(scheduler, work, lines)
                work = following or self._start(scheduler, [row for row in rows if not row.sequence.ended])
                yield said
        finally:
            scheduler.clear()

    def _in_lanes(self, scheduler: Scheduler, lines: Voices) -> Answers:
        """Several passes under way at once, so that each stage is at work on one; the oldest is heard first."""
        under = deque[Pass]()
        try:
            while under or scheduler.running or scheduler.waiting:
                self._check_open()
                if len(under) < self._runner.lanes and (begun := self._start(scheduler, scheduler.next())) is not None:
                    under.append(begun)
                elif not under:
                    raise RequestError(_starved(scheduler))
                else:
                    yield _settle(scheduler, under.popleft(), lines)
        finally:
            for work in under:  # what other stages have begun comes to its end
                work.tokens()

    def _start(self, scheduler: Scheduler, rows: list[Row]) -> Pass | None:
        """The pass of these rows; None where there are none."""
        if not rows:
            return None
        plan = self._runner.plan(rows)
        begun = self._runner.start(rows, plan, 1 if plan is None else scheduler.ahead(rows, plan.most))
        scheduler.advance(rows, begun.steps)
        return begun

    def _follow(self, scheduler: Scheduler, work: Pass, rows: list[Row]) -> Pass | None:
        """The pass of these rows, begun before it is known what the one under way says; None where that must be known.

        A sequence that ends by a stop token or string all the same has run on for nothing.
        """
        plan = self._runner.plan(rows, behind=True) if rows else None
        begun = None if plan is None else self._runner.follow(work, plan, scheduler.ahead(rows, plan.most))
        if begun is not None:
            scheduler.advance(rows, begun.steps)
        return begun

    def _voice(self, r: Request) -> Voice | None:
        return None if self._tokenizer is None else Voice(self._tokenizer, r.prompt, r.sampling.stop)


def _counts(value: object) -> bool:
    return isinstance(value, int) and is_token(value) and value >= 1


def _rejected(scheduler: Scheduler, line: Line, voice: Voice | None) -> Said | None:
    """Queue a sequence, or say why it can never run."""
    try:
        scheduler.add(line)
    except RequestError as refusal:
        return Said(line, voice, [], "rejected", error=str(refusal))
    return None


def _starved(scheduler: Scheduler) -> str:
    held = scheduler.pages.limit - scheduler.pages.free
    return (
        f"{len(scheduler.waiting)} sequences wait for pages, of which other streams of this generator hold {held} of "
        f"{scheduler.pages.limit}: finish those first"
    )


def _settle(scheduler: Scheduler, work: Pass, voices: Voices) -> list[Said]:
    """What a pass made, added to its sequences; those that end leave the scheduler."""
    tokens, scores = work.tokens(), work.scores() or [None] * len(work.lines)
    all_said = []
    for line, new, score in zip(work.lines, tokens, scores, strict=True):
        if line.ended:  # before these were made
            continue
        said = hear(line, voices[line], new, score)
        if said.reason:
            scheduler.finish(line)
        all_said.append(said)
    return all_said


def _bounds(model: Transformer, max_tokens: int | None) -> Bounds:
    e = model.tower.embed
    assert isinstance(e, Tokens), "the runner has refused other towers"
    rows = None if e.positions is None else e.positions - e.position_offset
    return Bounds(e.vocab, rows, max_tokens)
