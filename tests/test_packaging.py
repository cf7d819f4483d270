"""The package as users and packagers meet it: cheap to import, one version, whole folders, short files."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hasten
from hasten.ops.cpu.build import compilers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hasten"
SOURCES = sorted(path for pattern in ("*.py", "*.cpp", "*.h") for path in PACKAGE.rglob(pattern))

# `import hasten` may load none of these: each costs seconds or starts something.
HEAVY = (
    "matplotlib",
    "peft",
    "torch._dynamo",
    "torch._inductor",
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.pipelines",
    "triton",
)
# CPU seconds that `import hasten` may add, as a share of what `import torch` takes.
IMPORT_BUDGET = 0.5

LONGEST = 300
# File below hasten/ -> why it is one file and longer than LONGEST lines.
LONGER: dict[str, str] = {}

UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK|for now)\b")


def fresh(code: str) -> str:
    """What `code` prints in an interpreter of its own."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = fresh("import sys, hasten; print(*sys.modules, sep='\\n')").splitlines()
    assert sorted(set(HEAVY) & set(loaded)) == []


def test_import_leaves_cuda_alone() -> None:
    assert fresh("import hasten, torch; print(torch.cuda.is_initialized())") == "False\n"


def test_import_costs_little_beside_torch() -> None:
    code = """
from time import process_time
start = process_time(); import torch
middle = process_time(); import hasten
print((process_time() - middle) / (middle - start))
"""
    assert min(float(fresh(code)) for _ in range(3)) < IMPORT_BUDGET


def test_the_version_is_one_number() -> None:
    declared = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared == [hasten.__version__]


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder.relative_to(ROOT) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_no_source_file_is_long_without_a_reason() -> None:
    lengths = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > LONGEST and name not in LONGER} == {}
    assert [name for name in LONGER if lengths[name] <= LONGEST] == []


def test_no_source_file_is_unfinished() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): UNFINISHED.findall(path.read_text()) for path in SOURCES}
    assert {name: words for name, words in found.items() if words} == {}


class Hook:
    """hatchling's BuildHookInterface, as far as ours looks at it, on a copy of the sources."""

    def __init__(self, root: Path) -> None:
        shutil.copytree(
            PACKAGE / "ops" / "cpu",
            root / "hasten" / "ops" / "cpu",
            ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        )
        self.root, self.app, self.warnings = str(root), self, list[str]()

    def display_warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    name = "hatchling"
    for part in ("", ".builders", ".builders.hooks", ".builders.hooks.plugin", ".builders.hooks.plugin.interface"):
        monkeypatch.setitem(sys.modules, name + part, ModuleType(name + part))
    sys.modules[f"{name}.builders.hooks.plugin.interface"].BuildHookInterface = Hook  # type: ignore[attr-defined]
    return runpy.run_path(str(ROOT / "hatch_build.py"))["KernelsBuildHook"](tmp_path)


@pytest.mark.skipif(not compilers(), reason="no compiler")
def test_installing_compiles_the_kernels_into_a_wheel_of_this_platform(hook: Any, tmp_path: Path) -> None:
    data: dict[str, Any] = {"artifacts": []}
    hook.initialize("editable", data)
    assert data["artifacts"] == ["hasten/ops/cpu/kernels.so"]
    assert (tmp_path / data["artifacts"][0]).is_file()
    assert data["pure_python"] is False
    assert re.fullmatch(r"py3-none-\w+", data["tag"])
    assert hook.warnings == []


def test_installing_without_a_compiler_leaves_a_pure_package_and_says_so(
    hook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = tmp_path / "hasten" / "ops" / "cpu" / "kernels.so"
    stale.write_bytes(b"of sources that were there before")
    monkeypatch.setenv("PATH", "")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    data: dict[str, Any] = {"artifacts": []}
    hook.initialize("standard", data)
    assert data == {"artifacts": []}
    assert not stale.exists()
    assert ["no C++ compiler found" in text for text in hook.warnings] == [True]
