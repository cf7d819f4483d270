"""The model that ships: its text is the same before, during and after, and it is proven in every dtype."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.cli.load import SHIPPED, load_model, load_tokenizer
from hasten.demo.__main__ import PROMPTS, main

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_new_tokens": 40}
LIMIT = 24 * 2**20
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(SHIPPED))


@pytest.fixture
def model() -> Iterator[Any]:
    yield load_model(str(SHIPPED), "fp32", auto="AutoModelForCausalLM")


def texts(model: Any, tokenizer: Any) -> list[str]:
    """Greedy text behind every prompt alone and in a padded batch, by transformers' generate."""
    tokenizer.padding_side = "left"
    said = []
    for batch in (*([p] for p in PROMPTS), list(PROMPTS)):
        out = model.generate(**tokenizer(batch, return_tensors="pt", padding=True), **GREEDY)
        said += tokenizer.batch_decode(out, skip_special_tokens=True)
    return said


def test_the_files_are_complete_and_small() -> None:
    missing = [name for name in FILES if not (SHIPPED / name).is_file()]
    assert not missing, f"{SHIPPED} lacks {', '.join(missing)}"
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) <= LIMIT


def test_text_is_the_same_before_during_and_after(model: Any, tokenizer: Any) -> None:
    before = texts(model, tokenizer)
    engine = hasten.init_inference(model)
    during = texts(engine, tokenizer)
    assert engine.generating is not None and engine.generating.served > 0
    assert not any(b.detours for b in engine.backbones)
    after = texts(engine.revert(), tokenizer)
    assert before == during == after
    assert before[: len(PROMPTS)] == before[len(PROMPTS) :]
    assert all(t.startswith(p) and len(t) > len(p) for t, p in zip(before, (*PROMPTS, *PROMPTS), strict=True))


def test_native_text_is_transformers_text(model: Any, tokenizer: Any) -> None:
    want = texts(model, tokenizer)[: len(PROMPTS)]
    got = hasten.init_inference(model).generate(list(PROMPTS), tokenizer=tokenizer, max_new_tokens=40)
    assert [p + g.text for p, g in zip(PROMPTS, got, strict=True)] == want


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_it_is_proven(dtype: str) -> None:
    model = load_model(str(SHIPPED), dtype, auto="AutoModelForCausalLM")
    c = hasten.init_inference(model, certify=True).certificate
    assert c is not None
    assert c.passed
    assert c.fallbacks == ()
    assert c.agreement > (0.999 if dtype == "fp32" else 0.9)


def test_its_text_reads_as_english(model: Any, tokenizer: Any) -> None:
    """It is less surprised by an English sentence than by the same words in another order."""
    said = "The old man walked down to the river and looked at the water for a long time."
    words = said.split()
    shuffled = [" ".join(words[i] for i in torch.randperm(len(words)).tolist()) for _ in range(8)]
    losses = []
    with torch.no_grad():
        for text in (said, *shuffled):
            ids = tokenizer(text, return_tensors="pt").input_ids
            losses.append(float(model(ids, labels=ids).loss))
    assert losses[0] < min(losses[1:])


def test_the_demonstration_shows_text_speed_and_certificate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hasten.demo", "--new", "12", "--runs", "1"])
    assert main() == 0
    out = capsys.readouterr().out
    assert all(f"{p}" in out for p in PROMPTS)
    for part in ("transformers ", "hasten ", "tokens/s", "certificate of LlamaForCausalLM in float32: passed"):
        assert part in out
    assert "greedy tokens equal those of transformers" in out


def test_the_command_generates_with_it_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    from hasten.cli.__main__ import main as command

    assert Path(SHIPPED).is_dir()
    assert command(["generate", PROMPTS[0], "--max_new_tokens", "8", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(PROMPTS[0])
    assert len(out.strip()) > len(PROMPTS[0])
