"""`hasten bench --num_gpus` measures models that ranks divide, and one of them tells."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.test_generate_ranks import hasten

TINY = ("--quick", "--device", "cpu", "--runs", 1)


def test_divided_models_are_measured_and_one_rank_tells(tmp_path: Path) -> None:
    works = ("decode:tiny-llama:fp32", "encode:tiny-bert:fp32", "load:tiny-llama:fp32")
    file = tmp_path / "bench.json"
    r = hasten("bench", *works, "--num_gpus", 2, *TINY, "--json", file)
    assert r.returncode == 0, r.stderr
    found = [(x["work"].split(",")[0], x["engine"]) for x in json.loads(file.read_text())["results"]]
    names = ("decode tiny-llama fp32", "encode tiny-bert fp32", "load tiny-llama fp32")
    assert found == [(w, e) for w in names for e in ("transformers", "hasten")]
    assert r.stdout.count("| load tiny-llama fp32 | hasten |") == 1
    assert "divided among 2 ranks" in r.stdout
