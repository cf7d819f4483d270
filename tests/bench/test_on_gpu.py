"""What the benchmark does on a GPU alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hasten.bench.ceilings import measure
from hasten.bench.engines import Stand

pytestmark = pytest.mark.gpu


def test_the_ceilings_are_those_of_a_gpu() -> None:
    found = measure(torch.device("cuda"), [torch.float16])
    assert 2e11 < found.memory < 2e13
    assert 1e13 < found.matrix[torch.float16] < 1e16


def test_models_are_made_there_and_give_their_memory_back() -> None:
    before = torch.cuda.memory_allocated()
    stand = Stand("gpt2", torch.float16, torch.device("cuda"))
    stand.engine.generate([[1, 2, 3]], max_new_tokens=2, ignore_eos=True)
    assert {p.device.type for p in stand.model.parameters()} == {"cuda"}
    stand.close()
    assert torch.cuda.memory_allocated() - before < 2**26  # less than one copy of the model


def test_warmup_compiles_into_an_empty_cache_and_once_only(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hasten", "warmup", "gpt2", "--dtype", "fp16", "--batch", "1", "--prompt", "16"]
    said = []
    for _ in "ab":
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        said.append(int(done.stdout.split()[2]))
    assert said[0] >= 5
    assert said[1] == 0
