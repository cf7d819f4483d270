"""`hasten bench` measures what it is asked to, beside transformers, and writes it down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as T

from hasten.bench import shapes

SMALL = ("--prompt", 5, "--new", 4, "--runs", 2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of one layer in place of the known ones, and no second spent on memory's bandwidth."""
    gpt2 = T.GPT2Config(n_embd=24, n_layer=1, n_head=2, n_positions=32, vocab_size=50, eos_token_id=0, bos_token_id=0)
    bert = T.BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    monkeypatch.setitem(shapes.DECODERS, "gpt2", lambda: T.GPT2LMHeadModel(gpt2))
    for name in ("bert-base", "minilm"):
        monkeypatch.setitem(shapes.ENCODERS, name, lambda: T.BertModel(bert))
    monkeypatch.setattr("hasten.bench.timing.bandwidth", lambda: 12.34)


def test_a_decoder_and_an_encoder_side_by_side(command: Any, tmp_path: Path) -> None:
    files = {n: tmp_path / n for n in ("figures.json", "figures.md", "figures.png")}
    where = ("--json", files["figures.json"], "--markdown", files["figures.md"], "--plot", files["figures.png"])
    r = command("bench", "gpt2:fp32", "minilm:bf16", "--batch", 2, *SMALL, *where)
    assert r.status == 0
    told = json.loads(files["figures.json"].read_text(encoding="utf-8"))
    found = [(x["work"], x["engine"], x["unit"], x["runs"]) for x in told["results"]]
    decode, encode = "gpt2 fp32, batch 2, prompt 5 + 4", "minilm bf16, batch 2, 5 tokens"
    assert found == [
        (decode, "transformers", "tokens/s", 2),
        (decode, "transformers' generate() on hasten", "tokens/s", 2),
        (decode, "hasten", "tokens/s", 2),
        (encode, "transformers", "ms", 8),
        (encode, "hasten", "ms", 8),
    ]
    assert all(0 < x["least"] <= x["value"] <= x["most"] for x in told["results"])
    assert told["machine"]["bandwidth_gb_s"] == 12.3
    page = files["figures.md"].read_text(encoding="utf-8")
    assert page.strip() == r.out.strip()
    assert all(f"| {work} | {engine} |" in page for work, engine, *_ in found)
    assert files["figures.png"].read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_without_being_asked(command: Any) -> None:
    r = command("bench", *SMALL[:-1], 1, "--threads", 1)
    assert r.status == 0
    for work in ("gpt2 fp32", "gpt2 bf16", "bert-base fp32", "bert-base bf16", "minilm fp32"):
        assert f"| {work}, batch 1" in r.out


def test_more_tokens_than_the_model_has_positions(command: Any) -> None:
    r = command("bench", "gpt2", "--prompt", 30, "--new", 4)
    assert r.status == 2
    assert r.err.splitlines()[-1].endswith("hasten: gpt2 has 32 positions; 34 tokens are asked for")
