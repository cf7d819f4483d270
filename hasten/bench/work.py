"""A piece of work as a value: what is measured, on which model, of which size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hasten.bench.shapes import SHAPES, SMALL, config, kind
from hasten.errors import ConfigError

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
MEANINGS = {
    "generate": "tokens a second of prompt and completion together",
    "decode": "milliseconds a step, the prompt's own time taken off",
    "prefill": "milliseconds to the first token",
    "encode": "milliseconds of a batch through an encoder",
    "offline": "tokens a second of many requests of unequal lengths, all there at once",
    "load": "seconds from a folder of safetensors in the page cache to a model on the device, or on all ranks' devices",
    "start": "seconds from init_inference on a loaded model to the first token, in a process of its own",
    "cold-start": "the same where no kernel has been compiled before",
}
UNITS = {
    "generate": "tokens/s",
    "decode": "ms",
    "prefill": "ms",
    "encode": "ms",
    "offline": "tokens/s",
    "load": "s",
    "start": "s",
    "cold-start": "s",
}
SHORTEST = 32  # tokens of the shortest prompts and completions of offline work


@dataclass(frozen=True, slots=True)
class Work:
    """kind: a key of MEANINGS. Offline, batch counts requests, and prompt and new are the longest of each."""

    kind: str
    model: str  # a key of SHAPES, or a folder
    dtype: torch.dtype
    batch: int = 1
    prompt: int = 128
    new: int = 128

    def __str__(self) -> str:
        what = f"{self.kind} {self.model} {NAMES[self.dtype]}"
        match self.kind:
            case "generate":
                return f"{what}, batch {self.batch}, prompt {self.prompt} + {self.new}"
            case "decode":
                return f"{what}, batch {self.batch} behind {self.prompt} tokens"
            case "offline":
                return f"{what}, {self.batch} requests of up to {self.prompt} + {self.new}"
            case "load" | "start" | "cold-start":
                return what
            case _:
                images = self.model in SHAPES and SHAPES[self.model].kind == "image"
                return f"{what}, batch {self.batch}" + ("" if images else f", {self.prompt} tokens")

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence."""
        match self.kind:
            case "generate" | "decode" | "offline":
                return self.prompt + self.new + (self.kind == "decode")  # a step behind the first token
            case "encode":
                return self.prompt
            case _:
                return self.prompt + 1

    def check(self) -> None:
        """ConfigError where the model has fewer positions than the work has tokens."""
        room = getattr(config(self.model), "max_position_embeddings", None)
        if room is not None and self.tokens > room:
            raise ConfigError(f"{self.model} has {room} positions; {self.tokens} tokens are asked for")


def read_work(text: str) -> tuple[str, str, torch.dtype]:
    """(kind, model, dtype) of `KIND:MODEL:DTYPE`: without a kind decoders generate and encoders encode, in fp32.

    Raises ConfigError for what is none of them, and for work that the model cannot do.
    """
    from hasten.cli.load import torch_dtype

    parts = text.split(":")
    asked = parts.pop(0) if parts[0] in MEANINGS else None
    dtype = torch.float32
    if len(parts) > 1:
        read = torch_dtype(parts.pop())
        assert read is not None
        dtype = read
    model = ":".join(parts)
    does = kind(model)
    if does is None:
        there = ", ".join(SHAPES)
        raise ConfigError(f"{text}: no shape {model}; there are {there}, and folders of decoders, encoders and vision")
    natural = "generate" if does == "decoder" else "encode"
    chosen = asked or natural
    if chosen not in ("encode", "load") and does != "decoder":
        raise ConfigError(f"{text}: {model} is no decoder; {natural}:{model} is work that it can do")
    if chosen == "encode" and does == "decoder":
        raise ConfigError(f"{text}: {model} is a decoder; prefill:{model} is what comes nearest")
    return chosen, model, dtype


def sizes(kind: str) -> tuple[int, int, int]:
    """batch, prompt and new where nobody says."""
    return (600, 1024, 512) if kind == "offline" else (1, 128, 128)


def quick(w: Work) -> Work:
    """The same kind of work on a tiny model of the same architecture: it tries the benchmark, not the engines."""
    model = SMALL[SHAPES[w.model].config] if w.model in SHAPES else w.model
    return replace(w, model=model, batch=min(w.batch, 2), prompt=min(w.prompt, 9), new=min(w.new, 4))
