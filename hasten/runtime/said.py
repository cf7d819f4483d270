"""From new tokens to what is told of them: where a completion ends, its text, its events, and the whole of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hasten.errors import RequestError
from hasten.runtime.request import Chosen, Event, FinishReason, Generation
from hasten.runtime.scheduler import Sequence as Line
from hasten.runtime.text import Voice


@dataclass(slots=True)
class Said:
    """What a pass added to one completion. texts: of each token, None where they have not been asked for yet."""

    line: Line
    voice: Voice | None
    tokens: list[int]
    reason: FinishReason | None = None
    score: Chosen | None = None  # of the only token
    texts: list[str] | None = None
    error: str | None = None

    def spoken(self) -> list[str] | None:
        """The text of each token; None without a tokenizer. What follows a completed stop string is not said."""
        if self.texts is None and self.voice is not None:
            self.texts = []
            for i, token in enumerate(self.tokens):
                last = self.reason if i == len(self.tokens) - 1 else None
                text = "" if last == "stop" else self.voice.say(token)
                self.texts.append(text + self.voice.end() if last else text)
                if self.voice.stopped:
                    self.tokens, self.reason = self.tokens[: i + 1], "stop"
                    break
        return self.texts


def hear(line: Line, voice: Voice | None, tokens: list[int], score: Chosen | None) -> Said:
    """Add new tokens to a completion, up to its end. RequestError where one is -1: the logits were not numbers."""
    said = Said(line, voice, tokens, None, score)
    ends = line.request.ends
    if len(line.tokens) + len(tokens) >= line.limit:
        said.tokens, said.reason = tokens[: line.limit - len(line.tokens)], "length"
    if ends and not ends.isdisjoint(said.tokens):
        at = next(i for i, token in enumerate(said.tokens) if token in ends)
        said.tokens, said.reason = said.tokens[: at + 1], "stop"
    if voice is not None and voice.stops:
        said.spoken()
    if -1 in said.tokens:
        raise RequestError(
            f"prompt {line.request.index}: the model's logits for token {len(line.tokens) + said.tokens.index(-1)} are "
            "not numbers; float16 overflows at 65504, so try bfloat16 or float32"
        )
    line.hear(said.tokens)
    return said


def events(all_said: Sequence[Said]) -> Iterator[Event]:
    """One for each token, the first ones of all completions first, or for a rejection."""
    texts = [said.spoken() for said in all_said]
    for i in range(max((len(said.tokens) for said in all_said), default=0) or 1):
        for said, text in zip(all_said, texts, strict=True):
            if i < len(said.tokens):
                yield _event(said, said.tokens[i], None if text is None else text[i], i == len(said.tokens) - 1)
            elif said.error is not None:
                yield _event(said, None, None if text is None else "", True)


def _event(said: Said, token: int | None, text: str | None, last: bool) -> Event:
    line, score = said.line, said.score
    logprob, likeliest = (None, None) if score is None else (score.logprob, score.likeliest)
    reason = said.reason if last else None
    return Event(line.request.index, line.sample, token, text, logprob, likeliest, reason, said.error)


@dataclass(slots=True)
class Transcript:
    """Gathers what is said of one completion."""

    line: Line
    speaks: bool  # there is a tokenizer
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[Mapping[int, float]] = field(default_factory=list)
    reason: FinishReason | None = None
    error: str | None = None

    def add(self, said: Said) -> None:
        self.texts += said.spoken() or ()
        self.tokens += said.tokens
        self.reason, self.error = said.reason, said.error
        if said.score is not None and said.score.logprob is not None:
            self.logprobs.append(said.score.logprob)
            self.likeliest += [] if said.score.likeliest is None else [said.score.likeliest]

    def generation(self) -> Generation:
        """The completion, which has ended."""
        assert self.reason is not None, "the completion goes on"
        r = self.line.request
        return Generation(
            index=r.index,
            sample=self.line.sample,
            prompt=r.prompt,
            tokens=tuple(self.tokens),
            text="".join(self.texts) if self.speaks else None,
            finish_reason=self.reason,
            logprobs=None if r.sampling.logprobs is None else tuple(self.logprobs),
            likeliest=tuple(self.likeliest) if r.sampling.logprobs else None,
            error=self.error,
        )
