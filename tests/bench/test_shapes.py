"""The shapes are those of the models that they are named after."""

from __future__ import annotations

import pytest
import torch

from hasten.bench.shapes import DECODERS, ENCODERS, make
from hasten.bench.work import NAMES, measure
from hasten.errors import ConfigError

# Parameters of the published checkpoints; BERT's with the pooler and without a head.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-xl": 1_557_611_200,
    "llama-3.2-1b": 1_235_814_400,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "minilm": 22_713_216,
}


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_shape_has_the_parameters_of_its_model(name: str) -> None:
    with torch.device("meta"):
        model = (DECODERS | ENCODERS)[name]()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_models_are_made_alike_and_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "line", lambda: torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout()))
    one, two = make("line", torch.bfloat16), make("line", torch.bfloat16)
    assert torch.equal(one[0].weight, two[0].weight)
    assert one[0].weight.dtype == torch.bfloat16
    assert not one.training
    assert set(NAMES) == {torch.float32, torch.bfloat16, torch.float16}


def test_more_tokens_than_positions_are_refused_before_anything_is_measured() -> None:
    sizes = {"device": "cpu", "batch": 1, "new": 1, "runs": 1}
    with pytest.raises(ConfigError, match="minilm has 512 positions; 513 tokens are asked for"):
        measure("minilm", torch.float32, prompt=513, **sizes)
