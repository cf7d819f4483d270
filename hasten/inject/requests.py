"""What a call of the engine asks for, checked before the model sees it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RequestError
from hasten.inject.ahead import Check, Range
from hasten.inject.backbone import Backbone
from hasten.runtime import Sampling
from hasten.spec import Tokens

NAMES = tuple(f.name for f in fields(Sampling))
LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")


def sampling(arguments: Mapping[str, Any]) -> Sampling:
    """Native sampling settings; RequestError names an unknown one and the nearest that there is."""
    unknown = [n for n in arguments if n not in NAMES]
    if unknown:
        near = difflib.get_close_matches(unknown[0], NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
        raise RequestError(f"generate: unknown setting {unknown[0]!r} for a list of prompts; {hint}")
    return Sampling(**arguments)


def is_prompts(inputs: object) -> bool:
    """Whether this is a list of prompts, of any lengths, which native generation takes; a tensor is transformers'."""
    return isinstance(inputs, list | tuple | str)


def check_tensors(arguments: Mapping[str, Any], backbones: Iterable[Backbone]) -> None:
    """Raise RequestError for token ids that the embedding cannot look up or the position table cannot place."""
    for settle in begin_checks(arguments, backbones):
        settle()


def begin_checks(arguments: Mapping[str, Any], backbones: Iterable[Backbone]) -> Iterator[Check]:
    """`check_tensors` without waiting for a device: what the host knows raises here, the ids' range when settled.

    A device is asked at once, except by calls that choose when.
    """
    for b in backbones:
        e = b.tower.embed
        if not isinstance(e, Tokens):
            continue
        names = ("decoder_input_ids",) if b.seam.kind == "seq2seq-decoder" else ("input_ids", "inputs")
        for name in names:
            ids = arguments.get(name)
            if isinstance(ids, Tensor):
                check = _check_ids(name, ids, e)
                if not b.call.ahead:
                    check.begin()
                yield check


def check_lengths(arguments: Mapping[str, Any]) -> None:
    """Raise RequestError for lengths that are no counts."""
    for name in LENGTHS:
        value = arguments.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise RequestError(f"generate: {name}={value!r} is not a whole number of at least 0")


def check_limit(arguments: Mapping[str, Any], config: Any, limit: int | None, prompt: int) -> None:
    """Raise RequestError if a prompt and what is to follow exceed `limit` tokens (max_out_tokens)."""
    if limit is None:
        return
    new = arguments.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
    total = prompt + new if new else arguments.get("max_length") or getattr(config, "max_length", None) or prompt
    if max(total, prompt) > limit:
        raise RequestError(
            f"generate: {prompt} prompt tokens and up to {max(total - prompt, 0)} new ones are {max(total, prompt)}; "
            f"max_out_tokens={limit} was given to init_inference"
        )


def _check_ids(name: str, ids: Tensor, e: Tokens) -> Range:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise RequestError(f"{name} must be integers, got {ids.dtype}")
    if ids.ndim not in (2, 3) or 0 in ids.shape:  # heads over multiple choices take (batch, choices, tokens)
        what = (
            "a batch of zero prompts" if ids.ndim == 2 and not len(ids) else "an empty prompt" if ids.ndim == 2 else ""
        )
        raise RequestError(
            f"{name} must be (batch, tokens) with at least one of each, got {tuple(ids.shape)}: {what}".rstrip(": ")
        )
    check = _check_range(name, ids, e.vocab)
    room = None if e.positions is None else e.positions - e.position_offset
    if room is not None and ids.shape[-1] > room:
        check()  # an id without a row is the worse of two errors
        raise RequestError(f"{name} has {ids.shape[-1]} tokens; the model's position table ends at {room}")
    return check


def _check_range(name: str, ids: Tensor, vocab: int) -> Range:
    def judge(low: int, high: int) -> None:
        if low < 0 or high >= vocab:
            bad = low if low < 0 else high
            where = ", ".join(map(str, (ids == bad).nonzero()[0].tolist()))
            raise RequestError(f"{name}[{where}] is {bad}; the vocabulary has ids 0 to {vocab - 1}")

    return Range(ids, judge)
