"""What callers give for prompts, made into requests, or refused with everything that is wrong with them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RequestError
from hasten.runtime.request import Request, Sampling
from hasten.runtime.text import Tokenizer

SHOWN = 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a model can take. positions: how many its table of absolute positions has. most: tokens its owner allows."""

    vocab: int
    positions: int | None
    most: int | None

    def room(self) -> list[tuple[int, str]]:
        """Tokens that a prompt and its completion may have, and what says so."""
        rows = [(self.positions, "the model's table of positions has {}"), (self.most, "max_tokens is {}")]
        return [(limit, text.format(limit)) for limit, text in rows if limit is not None]


def requests(
    prompts: Iterable[Any],
    sampling: Sampling | Sequence[Sampling] | None,
    bounds: Bounds,
    *,
    ends: frozenset[int],
    tokenizer: Tokenizer | None,
) -> list[Request]:
    """One request per prompt: token ids, a tensor of them, or, with a tokenizer, a string."""
    if isinstance(prompts, str):
        raise RequestError("prompts is one string, not a list of prompts: write [prompt]")
    prompts = list(prompts)
    if not prompts:
        raise RequestError("no prompts: the batch is empty")
    samplings, problems = _samplings(sampling, len(prompts)), list[str]()
    made = [
        _request(i, prompt, s, bounds, ends, tokenizer, problems)
        for i, (prompt, s) in enumerate(zip(prompts, samplings, strict=True))
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise RequestError("; ".join(problems[:SHOWN]) + more)
    return [settled(r) for r in made]


def settled(r: Request) -> Request:
    """The request with a seed; one that needs none leaves torch's generator alone."""
    s = r.sampling
    if s.seed is not None or s.greedy:
        return r
    return Request(r.index, r.prompt, s, int(torch.randint(2**63 - 1, ()).item()), r.ends)


def _samplings(sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        return [sampling or Sampling()] * count
    given = list(sampling)
    if len(given) != count:
        raise RequestError(f"{len(given)} samplings for {count} prompts: give one for all, or one each")
    strange = [f"sampling {i} is {s!r}" for i, s in enumerate(given) if not isinstance(s, Sampling)]
    if strange:
        raise RequestError("; ".join(strange))
    return given


def _request(
    i: int,
    prompt: Any,
    s: Sampling,
    bounds: Bounds,
    ends: frozenset[int],
    tokenizer: Tokenizer | None,
    problems: list[str],
) -> Request:
    tokens, found = _tokens(prompt, tokenizer)
    found += [f"token {t} at position {at} is outside 0 to {bounds.vocab - 1}" for at, t in _outside(tokens, bounds)]
    found += _long(len(tokens), s, bounds)
    found += [f"stop token {t} is outside 0 to {bounds.vocab - 1}" for t in s.stop_tokens if t >= bounds.vocab]
    if s.stop and tokenizer is None:
        found.append("stop strings need a tokenizer, and there is none")
    problems += [f"prompt {i}: {problem}" for problem in found]
    stops = frozenset(s.stop_tokens) | (frozenset() if s.ignore_eos else ends)
    return Request(i, tuple(tokens), s, s.seed or 0, stops)


def _tokens(prompt: Any, tokenizer: Tokenizer | None) -> tuple[list[int], list[str]]:
    """Token ids, and what is wrong with the prompt."""
    if isinstance(prompt, str):
        if tokenizer is None:
            return [], ["text needs a tokenizer, and there is none"]
        tokens = list(tokenizer.encode(prompt))
        return tokens, [] if tokens else [f"the tokenizer makes no tokens of {prompt!r}"]
    if isinstance(prompt, Tensor):
        if prompt.ndim != 1 or prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            shape = f"{prompt.dtype} {tuple(prompt.shape)}"
            return [], [f"token ids are a tensor of integers with one axis, not {shape}"]
        prompt = prompt.tolist()
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes):
        return [], [f"{prompt!r} is not a list of token ids"]
    values = list(prompt)
    if not values:
        return [], ["it is empty; give at least one token"]
    if set(map(type, values)) == {int}:  # as nearly all are, found at the speed of C
        return values, []
    strange = [(at, v) for at, v in enumerate(values) if not _is_index(v)]
    if strange:
        return [], [f"{v!r} at position {at} is no token id" for at, v in strange[:SHOWN]]
    return [operator.index(v) for v in values], []


def _is_index(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _outside(tokens: list[int], bounds: Bounds) -> list[tuple[int, int]]:
    if tokens and min(tokens) >= 0 and max(tokens) < bounds.vocab:
        return []
    return [(at, t) for at, t in enumerate(tokens) if not 0 <= t < bounds.vocab][:SHOWN]


def _long(count: int, s: Sampling, bounds: Bounds) -> list[str]:
    found = []
    for limit, why in bounds.room():
        if count >= limit:
            found.append(f"its {count} tokens leave no room for a new one: {why}")
        elif count + s.max_new_tokens > limit:
            total = count + s.max_new_tokens
            found.append(f"{count} tokens and max_new_tokens={s.max_new_tokens} make {total}, but {why}")
    return found
