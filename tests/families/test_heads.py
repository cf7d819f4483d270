"""A decoder below any head of transformers', or below none, is served like the one below a language model's head."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T

from hasten.inject.attach import attach
from hasten.inject.loan import live_tensors
from hasten.model import Dense, Transformer
from hasten.weights import fetch
from tests.families.parity import same
from tests.tiny import TINY
from tests.tiny.llamas import BASE
from tests.tiny.model import Tiny, build

EXTRA = {"Gemma": {"head_dim": 10}, "Mistral": {"sliding_window": 5}, "Qwen2": {}, "Llama": {"attention_bias": True}}
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")
CLASSES = [f"{name}{head}" for name in EXTRA for head in HEADS if hasattr(T, f"{name}{head}")]


def make(name: str) -> T.PreTrainedModel:
    family = next(f for f in EXTRA if name.startswith(f))
    config = getattr(T, f"{family}Config")(**BASE, **EXTRA[family], num_labels=5)
    return build(Tiny(lambda: getattr(T, name)(config), "decoder"))


def test_only_the_heads_that_transformers_lacks_are_left_out() -> None:
    assert set(CLASSES) >= {f"{f}{h}" for f in EXTRA for h in HEADS} - {"GemmaForQuestionAnswering"}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_outputs_of_a_padded_batch(name: str, side: str) -> None:
    theirs = make(name)
    ours = copy.deepcopy(theirs)
    (backbone,) = attach(ours)
    backbone.install()
    ids = torch.randint(3, 64, (3, 9))
    ids[1, slice(0, 4) if side == "left" else slice(5, 9)] = BASE["pad_token_id"]
    mask = (ids != BASE["pad_token_id"]).long()
    arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "output_hidden_states": True}
    with torch.no_grad():
        same(ours(**arguments), theirs(**arguments), mask.bool())
    assert backbone.calls == 1
    assert not backbone.detours


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_without_a_language_models_head_is_described_without_one(name: str) -> None:
    (backbone,) = attach(make(name))
    assert backbone.tower.head is None


@pytest.mark.parametrize("name", [n for n, t in TINY.items() if t.kind == "decoder"])
def test_a_described_head_gives_the_models_own_logits(name: str) -> None:
    """On a live model the head stays the model's; generation of our own goes by the description."""
    model = build(TINY[name])
    (backbone,) = attach(model)
    tensors = live_tensors(model)
    tower = Transformer(backbone.tower, {b.param.name: fetch(b, tensors) for b in backbone.bindings})
    ids, positions = torch.randint(*TINY[name].ids, (2, 7)), torch.arange(7).expand(2, 7)
    with torch.no_grad():
        states = tower.blocks(tower.embed(ids, positions), Dense(positions))
        logits = tower.logits(tower.finish(states))
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_described_as_the_live_tensors_are_tied(tied: bool) -> None:
    """What counts is whether the two tables are one, not what the config says."""
    model = T.LlamaForCausalLM(T.LlamaConfig(**BASE, tie_word_embeddings=tied)).eval()
    (backbone,) = attach(model)
    assert backbone.tower.head is not None
    assert backbone.tower.head.tied is tied
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    (backbone,) = attach(model)
    assert backbone.tower.head is not None
    assert not backbone.tower.head.tied
