"""Where half precision rounds is part of an architecture: embeddings and norms give transformers' very bits."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch import Tensor

from hasten import ops
from hasten.inject.attach import attach
from hasten.inject.loan import live_tensors
from hasten.model import Transformer
from hasten.ops import NormLayer
from hasten.spec import Norm
from hasten.weights import fetch
from tests.tiny import TINY, build, experts, llamas

NAMES = [*llamas.TINY, *experts.TINY]
APART = {"nemotron"}  # transformers adds one to these weights in half precision; here the sum is float32


def half(name: str, dtype: torch.dtype) -> tuple[T.PreTrainedModel, Transformer]:
    model = build(TINY[name], dtype)
    (backbone,) = attach(model)
    tensors = live_tensors(model)
    return model, Transformer(backbone.tower, {b.param.name: fetch(b, tensors) for b in backbone.bindings})


def norms(tower: Transformer) -> list[tuple[str, Norm, str]]:
    """The live name, description and canonical name of a norm of each kind that a tower has."""
    first, a = tower.tower.blocks[0], tower.tower.blocks[0].attention
    found = [("norm", tower.tower.final_norm, "final_norm")]
    if a.qk_norm is not None:
        found += [(f"layers.0.self_attn.{n}", a.qk_norm, f"blocks.0.{n}") for n in ("q_norm", "k_norm")]
    assert first.norm == tower.tower.final_norm
    return [(live, spec, name) for live, spec, name in found if spec is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in APART])
def test_norms_round_where_transformers_rounds(name: str, dtype: torch.dtype) -> None:
    model, tower = half(name, dtype)
    for live, spec, canonical in norms(tower):
        weight = tower.weights[f"{canonical}.weight"]
        x = (torch.randn(3, 5, *weight.shape) * 4).to(dtype)
        with torch.no_grad():
            want: Tensor = model.model.get_submodule(live)(x)
            got = ops.norm(x, NormLayer(spec, weight, tower.weights.get(f"{canonical}.bias")))
        assert torch.equal(got, want), live


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_scaled_as_transformers_scales_them(name: str, dtype: torch.dtype) -> None:
    model, tower = half(name, dtype)
    ids, positions = torch.randint(3, 64, (2, 9)), torch.arange(9)[None]
    with torch.no_grad():
        want = model(ids, output_hidden_states=True, use_cache=False).hidden_states[0]
        assert torch.equal(tower.embed(ids, positions), want)
