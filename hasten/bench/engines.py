"""Ways to run one model: plain transformers, Hasten, and the peers that are installed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

import hasten
from hasten.bench.shapes import kind, make
from hasten.runtime import Sampling
from hasten.spec import Tokens, Tower

BESIDE = 4 * 2**30  # bytes that must be free beside two copies of a model


class Stand:
    """One model in one dtype on one device, and Hasten's engine on a copy of it, each made when it is first wanted.

    alone: no peer is to be measured, so Hasten takes the only copy, as it does where memory has no room for two.
    invariant: the engine's option batch_invariant. ranks: among how many processes the engine's model is divided.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        *,
        alone: bool = False,
        invariant: bool = False,
        ranks: int = 1,
    ) -> None:
        self.name, self.dtype, self.device, self._alone, self._invariant = name, dtype, device, alone, invariant
        self.ranks = ranks
        self.kind = kind(name)
        self.engines: dict[str, Engine] = {}  # by title

    @cached_property
    def model(self) -> Any:
        """transformers' module."""
        return make(self.name, self.dtype, self.device)

    @cached_property
    def alone(self) -> bool:
        """Whether there is one copy of the model: then no peer that needs its own is measured."""
        if self._alone or self.device.type != "cuda":
            return self._alone
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return torch.cuda.mem_get_info(self.device)[0] < size + BESIDE

    @cached_property
    def engine(self) -> hasten.InferenceEngine:
        model = self.model if self.alone else copy.deepcopy(self.model)
        how = {"device": str(self.device), "batch_invariant": self._invariant, "mp_size": self.ranks}
        return hasten.init_inference(model, **how)

    @property
    def tower(self) -> Tower:
        """What this process computes of it."""
        t = self.engine.backbones[0].transformer
        e, table = t.tower.embed, t.weights.get("tokens")
        here = replace(e, vocab=len(table)) if isinstance(e, Tokens) and table is not None else e
        return replace(t.tower, embed=here)

    @property
    def vocab(self) -> int:
        return self.model.config.vocab_size

    @property
    def room(self) -> int | None:
        """Positions that the model has, if it counts them."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def inputs(self, batch: int, tokens: int) -> dict[str, Tensor]:
        """What an encoder of this kind takes, random, the same each time."""
        torch.manual_seed(0)
        c = self.model.config
        if self.kind == "image":
            shape = (batch, c.num_channels, c.image_size, c.image_size)
            return {"pixel_values": torch.randn(shape, device=self.device).to(self.dtype)}
        ids = torch.randint(c.vocab_size, (batch, tokens), device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @property
    def decoding(self) -> str | None:
        """How Hasten's decode steps ran; None where it made none."""
        generating = self.engine.generating if "engine" in self.__dict__ else None
        return None if generating is None else str(generating.native)

    def close(self) -> None:
        """Give all memory back."""
        self.engines.clear()
        if "engine" in self.__dict__:
            self.engine.destroy()
        for name in ("engine", "model", "alone"):
            self.__dict__.pop(name, None)
        gc.collect()  # modules and what was put on them hold each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Engine(Protocol):
    """What is timed. `pace` divides the steps that decoding is measured over: slow engines make fewer."""

    pace: int

    def prepare(self, sequences: int, tokens: int) -> None:
        """What is done once before so many sequences of up to so many tokens, and counts for nothing."""

    def generate(self, prompts: list[list[int]], new: Sequence[int]) -> Any:
        """`new[i]` tokens behind `prompts[i]`, greedily, whatever ends they hold."""

    def encode(self, inputs: dict[str, Tensor]) -> Any:
        """A batch through an encoder."""


class Transformers:
    """transformers' own generate and forward, eager, on prompts of equal lengths."""

    pace = 8
    settings: dict[str, Any] = {}

    def __init__(self, stand: Stand) -> None:
        self.model = stand.model

    def prepare(self, sequences: int, tokens: int) -> None:
        pass

    def generate(self, prompts: list[list[int]], new: Sequence[int]) -> Any:
        ids = torch.tensor(prompts, device=self.model.device)
        how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        how |= {"max_new_tokens": new[0], "min_new_tokens": new[0]}
        return self.model.generate(ids, **how, **self.settings)

    def encode(self, inputs: dict[str, Tensor]) -> Any:
        return self.model(**inputs)


class Compiled(Transformers):
    """transformers with a static cache and torch.compile(mode="reduce-overhead"), as its documentation has it."""

    pace = 1
    settings = {"cache_implementation": "static"}

    @cached_property
    def compiled(self) -> Any:
        return torch.compile(self.model, mode="reduce-overhead")

    def encode(self, inputs: dict[str, Tensor]) -> Any:
        return self.compiled(**inputs)


class Live(Transformers):
    """transformers' own generate on the model that Hasten has taken over."""

    pace = 1

    def __init__(self, stand: Stand) -> None:
        self.model = stand.engine.module


class Native:
    """Hasten: native generation, and the fused backbone of an encoder."""

    pace = 1

    def __init__(self, stand: Stand) -> None:
        self.engine = stand.engine

    def prepare(self, sequences: int, tokens: int) -> None:
        self.engine.prepare(sequences, tokens)

    def generate(self, prompts: list[list[int]], new: Sequence[int]) -> Any:
        return self.engine.generate(prompts, [Sampling(max_new_tokens=n, ignore_eos=True) for n in new])

    def encode(self, inputs: dict[str, Tensor]) -> Any:
        return self.engine(**inputs)
