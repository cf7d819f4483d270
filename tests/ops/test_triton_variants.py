"""Kernels are compiled once for each launch that the rules choose: what differs from call to call makes no variant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.errors import ConfigError
from tests.ops.test_triton_compile import REGISTERS

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
pytest.importorskip("triton.tools.tensor_descriptor", reason="older Tritons leave the work to torch's kernels")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def counted() -> list[tuple[str, str, int, int]]:
    """(calls, kernel, variants, launches), in a process of its own, since TRITON_INTERPRET=1 makes no variants."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.variants"]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [tuple(row) for row in json.loads(done.stdout)]


def test_a_launch_takes_one_variant_whatever_the_rows_lengths_and_strides(
    counted: list[tuple[str, str, int, int]],
) -> None:
    found = [row for row in counted if row[2] > row[3]]
    more = [f"{variants:4} for {launches:2} launches: {kernel} of {what}" for what, kernel, variants, launches in found]
    assert not more, "\n".join(["variants that need not be:", *more])


def test_where_rows_must_not_depend_on_each_other_one_launch_takes_any_number_of_them(
    counted: list[tuple[str, str, int, int]],
) -> None:
    found = {(what, kernel): launches for what, kernel, _, launches in counted if what.endswith("batch-invariant")}
    assert {kernel for _, kernel in found} >= {"gemm_tile", "attend_tile", "norm_rows", "settle_rows", "weigh_block"}
    assert not {"gemv", "multiply_tile", "gemm_tiles", "attend_token"} & {kernel for _, kernel in found}
    for (what, kernel), launches in found.items():
        # products: tiles of 64 rows, of 128, and of 128 without weights sent for early; all of one instruction
        assert launches <= (3 if kernel == "gemm_tile" else 1), f"{kernel} of {what}"


def test_every_kernel_is_counted(counted: list[tuple[str, str, int, int]]) -> None:
    assert {kernel for _, kernel, _, _ in counted} == set(REGISTERS)


COMPILING = """
from hasten.cli import warmup
from hasten.ops.triton.compiled import HOPPER, compile_all, compiling, counting
from hasten.ops.triton.samples import SAMPLES

samples = [s for s in SAMPLES if s.op == "advance"][:2]
if __name__ == "__main__":
    with compiling(), counting() as found:
        for s in samples:
            s.run()
    compile_all(found, HOPPER, 2)
    made = warmup.kernels()
    with compiling() as driver:
        for s in samples:
            s.run()
    print(len(found), made, len(driver.loaded), warmup.kernels())
"""


def test_what_was_counted_is_compiled_by_other_processes_and_then_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import hasten.ops.triton\n" + COMPILING)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], check=False, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert done.stdout.split() == ["2", "2", "2", "2"]


def test_a_triton_without_the_hook_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.ops.triton.compiled import counting

    monkeypatch.setattr(triton, "knobs", None)
    with pytest.raises(ConfigError, match=rf"Triton {triton.__version__} has no knobs"), counting():
        pass
