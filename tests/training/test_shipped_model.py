"""The model that ships is whole, small, read by plain transformers, and has learned English."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

import hasten

FOLDER = Path(hasten.__file__).parent / "demo" / "model"
TEXT = (
    "The old king did not know what to do. He called his men to him and said that the enemy would come "
    "before the night was over, and that they must be ready to fight. Then he went out of the hall, and "
    "they saw that he was afraid."
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


def loss(model: LlamaForCausalLM, tokens: list[int]) -> float:
    with torch.inference_mode():
        return model(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss.item()


def test_the_folder_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 24e6


def test_weights_are_stored_once_in_the_type_the_config_names(model: LlamaForCausalLM) -> None:
    stored = {}
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            stored[name] = weights.get_tensor(name)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in stored and model.lm_head.weight is model.model.embed_tokens.weight
    loaded = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, stored[name]), name
        assert parameter.isfinite().all() and parameter.any(), name


def test_it_predicts_english_far_better_than_chance_and_than_shuffled_english(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    words = TEXT.split()
    random.Random(0).shuffle(words)
    uniform = torch.tensor(float(model.config.vocab_size)).log().item()
    english = loss(model, tokenizer(TEXT).input_ids)
    assert english < 0.6 * uniform
    assert english < loss(model, tokenizer(" ".join(words)).input_ids) - 0.5


def test_padding_on_the_left_changes_no_greedy_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = ["The king said to the", "You land on the planet and the people of the city greet you."]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    greedy = {"max_new_tokens": 12, "do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    together = tokenizer.batch_decode(model.generate(**batch, **greedy), skip_special_tokens=True)
    for prompt, text in zip(prompts, together, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **greedy)
        assert tokenizer.decode(alone[0], skip_special_tokens=True) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_card_names_every_source() -> None:
    card = (FOLDER / "README.md").read_text()
    manifest = json.loads((FOLDER / "data.json").read_text())
    assert manifest
    for source in manifest:
        assert f"| {source['source']} | {source['licence']} |" in card
        assert all(len(package["sha256"]) == 64 for package in source["packages"])
