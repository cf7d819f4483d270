"""`hasten warmup` makes a model's first calls, and says what they left in the cache of kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hasten.bench.engines import Stand
from hasten.bench.targets import standard
from hasten.bench.work import NAMES
from hasten.cli import warmup
from hasten.cli.__main__ import parser
from hasten.cli.warmup import Plan, plans_of
from hasten.inject.engine import InferenceEngine


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_batch_and_every_length_is_called_once(
    command: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    here = InferenceEngine.generate

    def generate(self: Any, prompts: Any, **how: Any) -> Any:
        asked.append([len(p) for p in prompts])
        folder = cache / str(len(asked))
        folder.mkdir(parents=True)
        (folder / "kernel.cubin").touch()  # what Triton leaves behind a compilation
        return here(self, prompts, **how)

    monkeypatch.setattr(InferenceEngine, "generate", generate)
    (cache / "before").mkdir(parents=True)
    (cache / "before" / "old.cubin").touch()
    r = command("warmup", "tiny-gpt2", "--dtype", "fp32", "--device", "cpu", "--batch", "1,3", "--prompt", "4,7,4096")
    assert r.status == 0
    assert asked == [[4], [4, 4, 4], [7], [61]]
    assert r.out.startswith("tiny-gpt2 fp32: 4 kernels compiled, ")
    assert r.out.endswith(f"s with loading, {cache} holds 5\n")


def test_encoders_images_and_folders_too(command: Any, cache: Path, gpt2: Path) -> None:
    for model in ("tiny-bert", "tiny-vit", str(gpt2)):
        r = command("warmup", model, "--device", "cpu", "--batch", "1,2", "--prompt", 5)
        assert r.status == 0
        assert r.out.startswith(f"{model} bf16: 0 kernels compiled, ")


def test_several_models_are_warmed_up_beside_each_other(command: Any, cache: Path) -> None:
    r = command("warmup", "tiny-bert", "tiny-vit", "--device", "cpu", "--batch", 1, "--prompt", 5)
    assert r.status == 0
    assert r.out.startswith("2 warm-ups took ")


def test_one_that_fails_is_bad_news(command: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = iter((0, 2))
    monkeypatch.setattr(warmup.subprocess, "Popen", lambda command: SimpleNamespace(wait=lambda: next(statuses)))
    assert command("warmup", "tiny-bert", "tiny-vit").status == 1


def test_the_standard_benchmark_is_warmed_up_as_it_will_call() -> None:
    plans = list(plans_of([t.work for t in standard()[1]]))
    assert plans[0] == Plan("llama-3.1-8b", "bf16", (1, 32, 128), (128, 2048, 8192), whole=False)
    assert plans[1] == Plan("llama-3.1-8b", "bf16", (1, 2, 4, 8, 16, 32, 64, 128, 256), (32, 512))
    assert plans[-1] == Plan("vit-l/16", "fp16", (1, 64), (128,), whole=False)
    assert {(p.model, p.dtype) for p in plans} == {(t.work.model, NAMES[t.work.dtype]) for t in standard()[1]}


@pytest.mark.parametrize("whole", [True, False])
def test_a_plan_is_told_to_its_process(whole: bool) -> None:
    p = Plan("a/folder", "fp16", (1, 3), (4, 9), whole)
    args = parser().parse_args(["warmup", *p.arguments("cuda:1")])
    assert Plan(*args.model, args.dtype, args.batch, args.prompt, not args.only) == p
    assert args.device == "cuda:1"
    assert parser().parse_args(["warmup", *p.arguments(None)]).device is None


def test_the_memory_of_one_copy_is_enough(command: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[bool] = []
    here = Stand.close
    monkeypatch.setattr(Stand, "close", lambda s: (copies.append(s.engine.module is s.model), here(s))[1])
    assert command("warmup", "tiny-bert", "--device", "cpu", "--batch", 1, "--prompt", 5).status == 0
    assert copies == [True]


def test_a_model_that_there_is_not(command: Any) -> None:
    r = command("warmup", "gpt9")
    assert r.status == 2
    assert r.err.startswith("hasten: gpt9: no folder of a model that Hasten knows, and none of gpt2")
    assert "name a model, or --standard" in command("warmup").err


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({"TRITON_CACHE_DIR": "/a"}, "/a"),
        ({"TRITON_HOME": "/b"}, "/b/.triton/cache"),
        ({"HOME": "/c"}, "/c/.triton/cache"),
    ],
)
def test_the_cache_is_where_triton_has_it(given: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert str(warmup.folder()) == folder


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt2", "tiny-bert", "tiny-vit"])
def test_a_mix_of_requests_needs_no_kernel_that_was_not_rehearsed(model: str) -> None:
    pytest.importorskip("triton.tools.tensor_descriptor", reason="older Tritons leave the work to torch's kernels")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-m", "tests.cli.rehearsed", model], Path(__file__).parents[2]
    done = subprocess.run(command, check=False, cwd=root, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert json.loads(done.stdout)["more"] == []
