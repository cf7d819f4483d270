"""`hasten bench` measures what it is asked to, beside other engines, and writes it down as it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.bench import ceilings, shapes
from hasten.bench.engines import Native
from hasten.bench.kinds import KINDS
from hasten.bench.targets import Target, standard
from hasten.bench.work import Work

SMALL = ("--prompt", 5, "--new", 4, "--runs", 2, "--device", "cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes in place of the known ones, and no second spent on what the device can do."""
    for name, small in (("gpt2", "tiny-gpt2"), ("bert-base", "tiny-bert"), ("minilm", "tiny-bert")):
        monkeypatch.setitem(shapes.SHAPES, name, shapes.SHAPES[small])
    monkeypatch.setattr(ceilings, "read", lambda: 12.34e9)
    monkeypatch.setattr(ceilings, "multiplied", lambda device, dtype: 5e10)


def test_a_decoder_and_an_encoder_side_by_side(command: Any, tmp_path: Path) -> None:
    files = {n: tmp_path / n for n in ("figures.json", "figures.md", "figures.png")}
    where = ("--json", files["figures.json"], "--markdown", files["figures.md"], "--plot", files["figures.png"])
    r = command("bench", "gpt2:fp32", "minilm:bf16", "--batch", 2, *SMALL, *where)
    assert r.status == 0
    told = json.loads(files["figures.json"].read_text(encoding="utf-8"))
    found = [(x["work"], x["engine"], x["unit"], x["runs"]) for x in told["results"]]
    generate, encode = "generate gpt2 fp32, batch 2, prompt 5 + 4", "encode minilm bf16, batch 2, 5 tokens"
    assert found == [
        (generate, "transformers", "tokens/s", 2),
        (generate, "transformers' generate() on hasten", "tokens/s", 2),
        (generate, "hasten", "tokens/s", 2),
        (encode, "transformers", "ms", 8),
        (encode, "hasten", "ms", 8),
    ]
    assert all(0 < x["least"] <= x["value"] <= x["most"] for x in told["results"])
    assert all(x["share"] > 0 for x in told["results"])
    assert told["machine"]["memory_gb_s"] == 12.3
    page = files["figures.md"].read_text(encoding="utf-8")
    assert page.strip() == r.out.strip()
    assert all(f"| {work} | {engine} |" in page for work, engine, *_ in found)
    assert files["figures.png"].read_bytes().startswith(b"\x89PNG")
    assert [line.partition(":")[0] for line in r.err.splitlines() if ": transformers " in line] == [generate, encode]


def test_what_is_measured_without_being_asked(command: Any) -> None:
    r = command("bench", *SMALL, "--runs", 1, "--threads", 1)
    assert r.status == 0
    for work in ("generate gpt2 fp32", "generate gpt2 bf16", "encode bert-base fp32", "encode minilm fp32"):
        assert f"| {work}, batch 1" in r.out


def test_several_sizes_of_the_same_work(command: Any) -> None:
    sizes = ("--batch", "1,3", "--context", "5,9", "--new", 4, "--runs", 1, "--device", "cpu")
    r = command("bench", "decode:gpt2:fp32", *sizes, "--peers", "none")
    assert r.status == 0
    rows = [line.split(" | ")[:2] for line in r.out.splitlines() if " | hasten | " in line]
    assert rows == [[f"| decode gpt2 fp32, batch {b} behind {p} tokens", "hasten"] for b in (1, 3) for p in (5, 9)]
    assert "transformers |" not in r.out


def test_a_model_from_a_folder(command: Any, gpt2: Path) -> None:
    r = command("bench", f"prefill:{gpt2}:fp32", *SMALL)
    assert r.status == 0
    assert f"| prefill {gpt2} fp32, batch 1, 5 tokens | hasten |" in r.out


def test_the_whole_standard_benchmark_runs_on_tiny_models(command: Any, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    r = command("bench", "--standard", "--quick", "--runs", 1, "--device", "cpu", "--json", file)
    assert r.status == 0, r.out
    told = json.loads(file.read_text(encoding="utf-8"))
    kinds = {x["work"].split()[0] for x in told["results"] if x["engine"] == "hasten"}
    assert kinds == {t.work.kind for t in standard()[1]}
    assert "targets" not in told  # there is nothing to compare tiny models with
    assert not [n for n in told["notes"] if "left out" in n]
    assert [n for n in told["notes"] if n.startswith("start tiny-llama bf16: imports ")]


def test_targets_are_told_and_judged(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = [Work("prefill", "gpt2", torch.float32, prompt=p) for p in (5, 9)]
    targets = [Target(works[0], 1e6, 1e-6, {"vLLM": 2.0}), Target(works[1], 1e-6, 1e-7)]
    monkeypatch.setattr("hasten.bench.targets.standard", lambda: ("measured elsewhere", targets))
    r = command("bench", "--standard", "--runs", 1, "--device", "cpu", "--json", tmp_path / "figures.json")
    assert r.status == 0  # a miss is a figure, not a failure
    told = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert [t["verdict"] for t in told["targets"]] == ["must", "MISS"]
    assert "measured elsewhere" in r.out


def test_a_run_that_is_stopped_has_written_what_it_had(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = KINDS["encode"].job

    def stopped(w: Any, *rest: Any) -> Any:
        if w.dtype == torch.bfloat16:
            raise KeyboardInterrupt
        return here(w, *rest)

    monkeypatch.setitem(KINDS, "encode", __import__("dataclasses").replace(KINDS["encode"], job=stopped))
    r = command("bench", "minilm:fp32", "minilm:bf16", *SMALL, "--json", tmp_path / "a", "--markdown", tmp_path / "b")
    assert r.status == 130
    told = json.loads((tmp_path / "a").read_text(encoding="utf-8"))
    assert {x["work"] for x in told["results"]} == {"encode minilm fp32, batch 1, 5 tokens"}
    assert "encode minilm fp32" in (tmp_path / "b").read_text(encoding="utf-8")


def test_a_work_that_hasten_fails_at_is_bad_news(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Native, "encode", breaks)
    r = command("bench", "minilm:fp32", "gpt2:fp32", *SMALL)
    assert r.status == 1
    assert "hasten left out: RuntimeError: no kernel" in r.out
    assert "| encode minilm fp32, batch 1, 5 tokens | transformers |" in r.out
    assert "| generate gpt2 fp32, batch 1, prompt 5 + 4 | hasten |" in r.out


def test_more_tokens_than_the_model_has_positions(command: Any) -> None:
    r = command("bench", "minilm:fp32", "gpt2", "--prompt", 61, "--new", 4, "--device", "cpu")
    assert r.status == 2
    assert r.out == ""
    assert r.err.splitlines()[-1].endswith("hasten: gpt2 has 64 positions; 65 tokens are asked for")


def test_the_start_of_a_process_is_measured_in_one(command: Any) -> None:
    r = command("bench", "start:gpt2:fp32", "--num_gpus", 2, *SMALL)
    assert r.status == 2
    assert "start:gpt2:fp32 is measured in one process" in r.err
