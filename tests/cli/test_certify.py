"""`hasten certify` ends with 0 only where the fused model is proven right without falling back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hasten import ops
from hasten.inject.certificate import Certificate
from hasten.ops.backends import load
from hasten.ops.table import Implementation


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_a_model_is_proven(model: str, dtype: str | None, command: Any, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    r = command("certify", folder, *(("--dtype", dtype) if dtype else ()))
    assert r.status == 0
    named = {None: "float32", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    assert f"in {named}: passed" in r.out
    assert r.err == ""


def test_the_file_holds_what_the_screen_shows(command: Any, gpt2: Path, tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    r = command("certify", gpt2, "--json", file, "--blocks", "--seed", 3, "--device", "cpu")
    assert r.status == 0
    told = json.loads(file.read_text(encoding="utf-8"))
    assert set(Certificate.__dataclass_fields__) <= told.keys()
    assert told["fallbacks"] == []
    assert len(told["blocks"]) == 3
    for b in told["blocks"]:
        assert f"  {b['tower']} {b['index']}: error {b['fused']:.2e}" in r.out
    again = tmp_path / "again.json"
    command("certify", gpt2, "--json", again, "--seed", 3)
    assert json.loads(again.read_text(encoding="utf-8")) == told
    assert "  transformer 0: error" not in command("certify", gpt2).out


@pytest.fixture
def wrong() -> Iterator[None]:
    """An implementation of `project` that is wrong by one in a hundred."""
    load()

    def off(x: Tensor, m: ops.Matrix, *rest: Any) -> Tensor:
        return ops.project.reference(x, m, *rest) * 1.01

    serving = ops.project.serving.get("cpu", ())
    ops.project.serving["cpu"] = (Implementation("planted", off, frozenset({"cpu"}), lambda *_: True), *serving)
    yield
    ops.project.serving["cpu"] = serving


def test_a_wrong_kernel_is_bad_news(wrong: None, command: Any, gpt2: Path) -> None:
    r = command("certify", gpt2)
    assert r.status == 1
    assert "fell back" in r.out
