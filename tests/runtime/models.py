"""Transformers of tiny models, and what transformers itself generates with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hasten.inject.attach import attach
from hasten.inject.loan import live_tensors
from hasten.model import Transformer
from hasten.weights import fetch
from tests.tiny import TINY, build

DECODERS = [name for name, tiny in TINY.items() if tiny.kind == "decoder"]


def transformer(model: PreTrainedModel) -> Transformer:
    """The decoder of a live model with a language model head, as Hasten runs it; the weights are shared or copied."""
    (backbone,) = attach(model)
    tensors = live_tensors(model)
    return Transformer(backbone.tower, {b.param.name: fetch(b, tensors).detach() for b in backbone.bindings})


def llama() -> Transformer:
    """A fresh tiny LLaMA, the same at every call."""
    return transformer(build(TINY["llama"]))


def theirs(model: PreTrainedModel, prompt: Sequence[int], new: int, **arguments: Any) -> list[int]:
    """The new tokens of transformers' generate() for one prompt, greedy unless told otherwise."""
    return theirs_scored(model, prompt, new, **arguments)[0]


def theirs_scored(
    model: PreTrainedModel, prompt: Sequence[int], new: int, **arguments: Any
) -> tuple[list[int], list[float]]:
    """The new tokens, and the logarithm of the share that each had in the logits of its step."""
    ids = torch.tensor([list(prompt)])
    settings = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None} | arguments
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **settings
        )
    tokens = out.sequences[0, len(prompt) :].tolist()
    shares = torch.cat(out.logits).float().log_softmax(-1)
    return tokens, shares[range(len(tokens)), tokens].tolist()
