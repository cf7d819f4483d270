"""`scripts/gpu` runs every stage, keeps what each said, and tells what failed or is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu"
PYTHON = """#!/usr/bin/env bash
case "$*" in
    -) cat >/dev/null && echo "$LACKS" ;;
    *"sys.exit(not torch"*) exit "$BLIND" ;;
    *"-c import"*) exit 1 ;;
    *) echo "ran $*"; [[ "$*" != "-m pytest"* ]] || exit "$TESTS" ;;
esac
"""

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("bash", "timeout", "tee"))), reason="needs coreutils")


def gpu(place: Path, lacks: str = "", blind: int = 0, tests: int = 0) -> subprocess.CompletedProcess[str]:
    """The script with a Python that only says what it is asked to run."""
    python = place / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    told = {"LACKS": lacks, "BLIND": str(blind), "TESTS": str(tests), "OUT": str(place / "out")}
    command = ["bash", str(SCRIPT), str(python)]
    return subprocess.run(command, check=False, env=os.environ | told, capture_output=True, text=True)


def test_every_stage_runs_and_its_words_are_kept(tmp_path: Path) -> None:
    done = gpu(tmp_path)
    assert done.returncode == 0, done.stderr
    logs = {file.name: file.read_text() for file in (tmp_path / "out").iterdir()}
    assert logs.keys() == {"environment.txt", "warmup.txt", "tests.txt", "benchmark.txt"}
    assert "-m gpu or multigpu" in logs["tests.txt"]
    assert "hasten bench --standard" in logs["benchmark.txt"]
    assert all(text in done.stdout for text in logs.values())


def test_stages_take_nine_minutes_at_most() -> None:
    limits = [int(line.split()[2]) for line in SCRIPT.read_text().splitlines() if line.startswith("stage ")]
    assert len(limits) == 4
    assert sum(limits) <= 540 - 30  # the processes that are killed get time to end


def test_tests_that_fail_do_not_keep_the_benchmark_from_running(tmp_path: Path) -> None:
    done = gpu(tmp_path, tests=3)
    assert done.returncode == 1
    assert done.stderr == "gpu: failed: tests (3)\n"
    assert (tmp_path / "out" / "benchmark.txt").is_file()


def test_a_stage_out_of_time_says_so(tmp_path: Path) -> None:
    done = gpu(tmp_path, tests=124)
    assert done.returncode == 1
    assert "gpu: tests ran out of its" in (tmp_path / "out" / "tests.txt").read_text()


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    done = gpu(tmp_path, lacks="pytest hypothesis")
    assert done.returncode == 2
    assert "lacks: pytest hypothesis; name a Python" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    done = gpu(tmp_path, blind=1)
    assert done.returncode == 0
    assert "sees no CUDA device here: nothing was run" in done.stdout
