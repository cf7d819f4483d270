"""Divided models on two GPUs: what the tests of ranks hold on a CPU, in one process for each rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.checkpoints import test_shares as shares
from tests.checkpoints.megatron_files import of_gpt2, write
from tests.checkpoints.test_megatron import described, gpt2
from tests.inject import test_rank_encoders as encoders
from tests.inject import test_rank_faults as faults
from tests.inject import test_rank_vocabulary as vocabulary
from tests.parallel import gpus

pytestmark = pytest.mark.multigpu


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """All of them from one start of the ranks."""
    llama, megatron = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("megatron")
    shares.made("llama").save_pretrained(llama)
    inside = write(megatron, of_gpt2(gpt2()), heads=4, ranks=4, stages=2, chunks=1, version=2, era="encoder")
    calls: dict[str, Any] = {
        "untied": (vocabulary.used, ("llama",)),
        "tied": (vocabulary.used, ("gemma3_text",)),
        "slices": (shares.filled, ("llama", str(llama), {})),
        "bf16": (shares.filled, ("llama", str(llama), {"dtype": torch.bfloat16})),
        "megatron": (shares.filled, ("megatron", described(inside, version=2.0, tp_size=4, pp_size=2), {})),
        "encoder": (encoders.recorded_on_gpus, ()),
        "fault": (faults.short_of_memory, ("bloom", 9, {"dtype": torch.bfloat16, "keep_originals": True})),
        "cache": (faults.mixed, ("llama", True)),
    }
    return dict(zip(calls, gpus.run([*calls.values()]), strict=True))


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_rows_of_the_vocabulary(answers: dict[str, list[Any]], kind: str) -> None:
    assert answers[kind] == [[], []]


@pytest.mark.parametrize(("kind", "close"), [("slices", 1e-4), ("bf16", 3e-2), ("megatron", 1e-4)])
def test_slices_of_files(answers: dict[str, list[Any]], kind: str, close: float) -> None:
    for off, same, back, read, needed in answers[kind]:
        assert off < close
        assert same and back
        assert read == needed


def test_encoders_are_recorded(answers: dict[str, list[Any]]) -> None:
    for right, recorded, refused in answers["encoder"]:
        assert right and recorded == 2 and not refused


def test_faults_and_caches(answers: dict[str, list[Any]]) -> None:
    first, second = answers["fault"]
    assert second == "on purpose" and first.endswith("rank 1: MemoryError: on purpose")
    for said, well in answers["cache"]:
        assert "Begin with a new cache" in said and well
