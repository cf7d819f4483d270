"""The shapes are those of the models that they are named after, and are made as they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.bench.shapes import SHAPES, SMALL, config, kind, make

# Parameters of the published checkpoints; BERT's and ViT's with the pooler and without a head.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-xl": 1_557_611_200,
    "gpt-neo-2.7b": 2_651_307_520,
    "gpt-j-6b": 6_050_882_784,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "minilm": 22_713_216,
    "vit-l/16": 304_351_232,
}


@pytest.mark.parametrize("name", [n for n in SHAPES if not n.startswith("tiny-")])
def test_a_shape_has_the_parameters_of_its_model(name: str) -> None:
    model = make(name, torch.bfloat16, "meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", SMALL.values())
def test_models_are_made_alike_complete_and_ready(name: str) -> None:
    one, two = (dict(make(name, torch.float32, "cpu").named_parameters()) for _ in "ab")
    for n, p in one.items():
        assert torch.equal(p, two[n])
        assert torch.isfinite(p).all()
        spread = float(p.detach().std()) if p.numel() > 200 else 0.02
        assert 0.01 < spread < 0.03 or (p == 1).all(), n
    model = make(name, torch.float16, "cpu")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert torch.get_default_dtype() == torch.float32


def test_tied_tables_are_one_tensor() -> None:
    model = make("tiny-gpt2", torch.float32, "cpu")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_positions_are_counted_in_float32_whatever_the_dtype() -> None:
    model = make("tiny-llama", torch.bfloat16, "cpu")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_every_architecture_has_a_tiny_shape_of_its_kind() -> None:
    assert {s.config for s in SHAPES.values()} - SMALL.keys() == {"GPTJConfig", "Qwen3Config"}
    assert all(SHAPES[tiny].config == name for name, tiny in SMALL.items())


def test_a_folder_is_a_model_too(tmp_path: Path) -> None:
    first = make("tiny-gpt2", torch.float32, "cpu")
    first.save_pretrained(tmp_path)
    assert kind(str(tmp_path)) == "decoder"
    assert config(str(tmp_path)).n_embd == 32
    second = make(str(tmp_path), torch.bfloat16, "cpu")
    assert torch.equal(second.transformer.wte.weight, first.transformer.wte.weight.bfloat16())
    assert [kind(n) for n in ("tiny-vit", "tiny-bert", "gpt9")] == ["image", "encoder", None]
