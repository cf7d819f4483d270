"""The pieces of work: generation by a decoder, and a batch through an encoder, by transformers and by Hasten."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import hasten
from hasten.bench.shapes import DECODERS, make
from hasten.bench.timing import Result, interleave, summarize
from hasten.errors import ConfigError

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def measure(
    name: str,
    dtype: torch.dtype,
    *,
    device: str,
    batch: int,
    prompt: int,
    new: int,
    runs: int,
    advance: Callable[[], Any] = lambda: None,
) -> list[Result]:
    """One shape in one dtype: a decoder generates `new` tokens behind `prompt`, an encoder reads `prompt` tokens."""
    theirs = make(name, dtype).to(device)
    tokens, room = prompt + (new if name in DECODERS else 0), theirs.config.max_position_embeddings
    if tokens > room:
        raise ConfigError(f"{name} has {room} positions; {tokens} tokens are asked for")
    engine = hasten.init_inference(copy.deepcopy(theirs), device=device)
    work = _generate if name in DECODERS else _encode
    with torch.inference_mode():
        return work(f"{name} {NAMES[dtype]}", theirs, engine, batch, prompt, new, runs, advance)


def _generate(
    work: str, theirs: Any, engine: Any, batch: int, prompt: int, new: int, runs: int, advance: Callable[[], Any]
) -> list[Result]:
    ids = torch.randint(theirs.config.vocab_size, (batch, prompt), device=theirs.device)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    how |= {"max_new_tokens": new, "min_new_tokens": new}
    prompts = ids.tolist()
    calls = {
        "transformers": lambda: theirs.generate(ids, **how),
        "transformers' generate() on hasten": lambda: engine.module.generate(ids, **how),
        "hasten": lambda: engine.generate(prompts, max_new_tokens=new, ignore_eos=True),
    }
    times = interleave(calls, runs, advance=advance)
    what = f"{work}, batch {batch}, prompt {prompt} + {new}"
    return summarize(what, times, "tokens/s", batch * new)


def _encode(
    work: str, theirs: Any, engine: Any, batch: int, prompt: int, new: int, runs: int, advance: Callable[[], Any]
) -> list[Result]:
    ids = torch.randint(theirs.config.vocab_size, (batch, prompt), device=theirs.device)
    mask = torch.ones_like(ids)
    calls = {
        "transformers": lambda: theirs(ids, attention_mask=mask),
        "hasten": lambda: engine(ids, attention_mask=mask),
    }
    times = interleave(calls, runs * 4, advance=advance)
    return summarize(f"{work}, batch {batch}, {prompt} tokens", times, "ms", None)
