"""`hasten check` says what is here, and that something is missing where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hasten.cli import check
from hasten.ops import TABLE
from hasten.ops.cpu import library


def test_versions_devices_and_kernels_are_told(command: Any) -> None:
    r = command("check")
    assert r.status == 0
    assert r.err == ""
    assert f"torch        {torch.__version__}" in r.out
    assert f"transformers {transformers.__version__}" in r.out
    assert "cuda" in r.out
    assert f"ops          {len(TABLE)}, with " in r.out
    for name in {i.backend for op in TABLE.values() for i in op.implementations}:
        assert f" {name} for " in r.out


def test_the_kernels_of_the_cpu_are_told_or_why_there_are_none(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def line() -> str:
        return next(line for line in command("check").out.splitlines() if line.startswith("cpu kernels  "))

    found = library.load()
    if isinstance(found, library.Library):
        assert line() == f"cpu kernels  Hasten's, {library.LEVELS[found.level]}, threads {torch.get_num_threads()}"
    monkeypatch.setattr(library, "load", lambda: "no compiler")
    assert line() == "cpu kernels  torch's: no compiler"


def test_every_op_is_listed_when_asked_for(command: Any) -> None:
    lines = command("check", "--ops").out.splitlines()
    for op in TABLE.values():
        assert any(line.split()[0] == op.name and line.endswith("reference") for line in lines if line.startswith("  "))


def test_a_missing_package_is_named_with_status_one(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = check._version
    monkeypatch.setattr(check, "_version", lambda name: None if name in ("safetensors", "peft") else here(name))
    r = command("check")
    assert r.status == 1
    assert "missing: safetensors\n" in r.out
    assert "peft         not installed  (optional)" in r.out
