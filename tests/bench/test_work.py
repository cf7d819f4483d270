"""Works are read from what users write, named, checked, and made small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.bench.shapes import make
from hasten.bench.targets import standard
from hasten.bench.work import Work, quick, read_work, sizes
from hasten.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("gpt2:fp16", ("generate", "gpt2", torch.float16)),
        ("minilm", ("encode", "minilm", torch.float32)),
        ("vit-l/16:bf16", ("encode", "vit-l/16", torch.bfloat16)),
        ("decode:llama-3.1-8b:bf16", ("decode", "llama-3.1-8b", torch.bfloat16)),
        ("offline:gpt2", ("offline", "gpt2", torch.float32)),
        ("cold-start:gpt2:bfloat16", ("cold-start", "gpt2", torch.bfloat16)),
    ],
)
def test_a_work_is_a_kind_a_model_and_a_dtype(text: str, read: object) -> None:
    assert read_work(text) == read


def test_a_folder_whose_name_has_a_colon(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    make("tiny-gpt2", torch.float32, "cpu").save_pretrained(folder)
    assert read_work(f"prefill:{folder}:fp16") == ("prefill", str(folder), torch.float16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("decode:gpt9:fp16", "no shape gpt9; there are gpt2"),
        ("encode:gpt2:fp16", "gpt2 is a decoder; prefill:gpt2"),
        ("decode:minilm:fp16", "minilm is no decoder; encode:minilm"),
        ("start:minilm:fp16", "minilm is no decoder"),
        ("gpt2:fp12", "--dtype fp12"),
    ],
)
def test_what_cannot_be_measured_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_work(text)


def test_more_tokens_than_positions_are_refused_before_anything_is_made() -> None:
    with pytest.raises(ConfigError, match="minilm has 512 positions; 513 tokens are asked for"):
        Work("encode", "minilm", torch.float32, prompt=513).check()
    with pytest.raises(ConfigError, match="gpt2 has 1024 positions; 1025 tokens"):
        Work("generate", "gpt2", torch.float32, prompt=897).check()
    Work("encode", "minilm", torch.float32, prompt=512).check()
    Work("encode", "vit-l/16", torch.float32, prompt=10**6).check()  # an image has its own size


def test_names_tell_works_apart() -> None:
    works = [t.work for t in standard()[1]]
    assert len({str(w) for w in works}) == len(works)
    assert str(works[0]) == "decode llama-3.1-8b bf16, batch 1 behind 128 tokens"


def test_quick_works_fit_their_tiny_models() -> None:
    for t in standard()[1]:
        w = quick(t.work)
        w.check()
        assert w.kind == t.work.kind
        assert w.model.startswith("tiny-")


def test_offline_work_is_many_requests_without_being_asked() -> None:
    assert sizes("offline") == (600, 1024, 512)
    assert sizes("decode") == (1, 128, 128)
