"""What is asked of generation and what comes back: plain values, without tensors or a clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from hasten.errors import RequestError

FinishReason = Literal["length", "stop", "rejected"]
"""length: max_new_tokens were made. stop: a stop token or a stop string came. rejected: it fits no memory there is."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens behind one prompt are chosen. Each filter means what it means in transformers.

    They apply in this order: the three penalties, temperature, min_p, top_k, top_p. Presence and frequency penalties
    are OpenAI's, over the tokens generated so far; the repetition penalty (arXiv 1909.05858) counts the prompt's too.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0  # no stop token is chosen before; stop strings are heeded from the start
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: drawn from torch's generator, so that torch.manual_seed governs it
    n: int = 1  # completions of the same prompt
    stop_tokens: Sequence[int] = ()  # beside the generator's own end tokens
    stop: Sequence[str] = ()  # text ends before the first of them
    ignore_eos: bool = False  # the generator's own end tokens do not stop; `stop_tokens` still do
    logprobs: int | None = None  # 0: of each chosen token; k: and of the k likeliest at each step

    def __post_init__(self) -> None:
        problems = [*self._counts(), *self._numbers(), *self._stops()]
        if problems:
            raise RequestError("sampling: " + "; ".join(problems))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def _counts(self) -> list[str]:
        least = {"max_new_tokens": 1, "min_new_tokens": 0, "top_k": 0, "n": 1}
        counts = {name: getattr(self, name) for name in least}
        counts |= {} if self.logprobs is None else {"logprobs": self.logprobs}
        counts |= {} if self.seed is None else {"seed": self.seed}
        problems = [
            f"{name}={value!r} is not an integer of at least {least.get(name, 0)}"
            for name, value in counts.items()
            if not is_token(value) or value < least.get(name, 0)
        ]
        if not problems and self.min_new_tokens > self.max_new_tokens:
            problems.append(f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}")
        return problems

    def _numbers(self) -> list[str]:
        below, above = -math.inf, math.inf
        ranges: dict[str, tuple[float, float, str]] = {
            "temperature": (0.0, above, "a finite number of at least 0"),
            "top_p": (math.ulp(0.0), 1.0, "a number above 0 and at most 1"),
            "min_p": (0.0, 1.0, "a number from 0 to 1"),
            "repetition_penalty": (math.ulp(0.0), above, "a finite number above 0"),
            "presence_penalty": (below, above, "a finite number"),
            "frequency_penalty": (below, above, "a finite number"),
        }
        return [
            f"{name}={value!r} is not {wanted}"
            for name, (least, most, wanted) in ranges.items()
            if not _number(value := getattr(self, name)) or not least <= value <= most
        ]

    def _stops(self) -> list[str]:
        problems = []
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            problems.append(f"stop={self.stop!r} is not a sequence of strings with at least one character each")
        if isinstance(self.stop_tokens, int) or not all(is_token(t) and t >= 0 for t in self.stop_tokens):
            problems.append(f"stop_tokens={self.stop_tokens!r} is not a sequence of token ids")
        return problems


def is_token(value: object) -> bool:
    """Whether this is an int and no bool, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of a call, at `index` in it. `ends`: every token id that stops it. `seed` is settled."""

    index: int
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    ends: frozenset[int] = frozenset()

    @property
    def limit(self) -> int:
        """Tokens at which it is done, the prompt's among them."""
        return len(self.prompt) + self.sampling.max_new_tokens


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token that was sampled. logprob: natural logarithm of its softmax share, before penalties and temperature."""

    token: int
    logprob: float | None = None
    likeliest: Mapping[int, float] | None = None  # the `Sampling.logprobs` likeliest tokens and their logprobs


@dataclass(frozen=True, slots=True)
class Event:
    """One step of one completion. `text` is what became certain with it, which may be none or several tokens'."""

    index: int  # of the prompt
    sample: int  # of its n completions
    token: int | None  # None only where it was rejected
    text: str | None  # None without a tokenizer
    logprob: float | None = None
    likeliest: Mapping[int, float] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One completion. `tokens` ends with the token that stopped it; `text` ends before a stop token or stop string."""

    index: int
    sample: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    likeliest: tuple[Mapping[int, float], ...] | None = None
    error: str | None = None


def uniform(seed: int, sample: int, step: int) -> float:
    """A number from [0, 1 - 2^-52] that these three alone decide: the same in every batch and after every restart."""
    key = b"%d,%d,%d" % (seed, sample, step)
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 12) * 2.0**-52
