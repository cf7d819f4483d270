"""Tiny models with tokenizers on disk, and the command as users call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers as T

from hasten.cli.__main__ import main
from tests.inject.vocabulary import BYTES, bytes_and_merges
from tests.tiny.model import Tiny, build


@dataclass(frozen=True)
class Result:
    """What one run of the command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `hasten` with the arguments, in this process."""

    def run(*argv: object) -> Result:
        capsys.readouterr()
        try:
            status = main([str(a) for a in argv])
        except SystemExit as e:
            status = int(e.code or 0)
        said = capsys.readouterr()
        return Result(status, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of 3 layers that reads bytes."""
    shape = {"n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": 64, "vocab_size": BYTES}
    model = build(Tiny(lambda: T.GPT2LMHeadModel(T.GPT2Config(**shape, bos_token_id=1, eos_token_id=2)), "decoder"))
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    model.save_pretrained(folder)
    bytes_and_merges().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, without a tokenizer."""
    shape = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = T.BertConfig(**shape, vocab_size=BYTES, max_position_embeddings=64)
    folder = tmp_path_factory.mktemp("models") / "bert"
    build(Tiny(lambda: T.BertModel(config), "encoder")).save_pretrained(folder)
    return folder
