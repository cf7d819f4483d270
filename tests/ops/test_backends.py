"""Backends are imported by `load`, where they run, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hasten.ops import act, backends, write_pages
from hasten.ops.backends import load
from tests.ops.cases import CASES

pytest.importorskip("triton", reason="Triton has no build for this platform")


def test_triton_is_imported_where_it_runs_and_only_by_load() -> None:
    code = (
        "import sys, hasten.ops; assert 'triton' not in sys.modules; from hasten.ops.backends import load; "
        "names = load(); assert names == load(); print(*names); assert ('triton' in names) == ('triton' in sys.modules)"
    )
    for flag, expected in (("1", True), ("0", torch.cuda.is_available())):
        environment = {**os.environ, "TRITON_INTERPRET": flag}
        done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
        assert ("triton" in done.stdout.split()) is expected


def test_a_triton_without_what_the_kernels_need_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.BACKENDS["triton"][0]()
    older = lambda name: None if name == "triton.tools.tensor_descriptor" else True  # noqa: E731
    monkeypatch.setattr(backends, "find_spec", older)
    assert not backends.BACKENDS["triton"][0]()


def test_interpreted_kernels_serve_no_call_by_themselves() -> None:
    load()
    for op, arguments in (
        (act, (torch.zeros(2, 8), "relu")),
        (write_pages, CASES["write_pages"]["one token"](torch.float32)),
    ):
        assert op.choose(*arguments) is not next((i.run for i in op.implementations if i.backend == "triton"), None)
