"""Who may import whom. The tables are the architecture; the rest of the file holds `hasten/` to them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hasten"

# Part of hasten/ -> the parts it may import besides itself and `errors`. "hasten" is hasten/__init__.py.
EVERYTHING = {"*"}
FLOORS: dict[str, set[str]] = {
    "errors": set(),
    "spec": set(),
    "weights": {"spec"},
    "ops": {"spec", "parallel"},
    "parallel": set(),
    "families": {"spec", "weights"},
    "checkpoints": {"spec", "weights"},
    "model": {"spec", "weights", "ops", "parallel"},
    "inject": {"model", "families", "checkpoints", "parallel", "weights", "ops", "spec", "runtime"},
    "module_inject": {"inject", "families", "spec", "weights"},
    "moq": {"weights", "families"},
    "runtime": {"model", "ops", "spec", "parallel"},
    "server": {"runtime"},
    "hasten": {"inject"},
    "cli": EVERYTHING,
    "__main__": EVERYTHING,
    "bench": EVERYTHING,
    "demo": EVERYTHING,
}

# Installed package -> where in hasten/ it may be imported; "" is anywhere. Packages without a row are no dependencies.
INSTALLED: dict[str, set[str]] = {
    "torch": {""},
    "numpy": {""},
    "safetensors": {""},
    "tqdm": {""},
    "transformers": {"inject", "checkpoints/names", "server/text", "cli", "demo", "bench"},
    "peft": {"inject"},
    "triton": {"ops/triton"},
    "matplotlib": {"bench"},
}

# Data and decisions: these import the standard library and each other, no installed package.
PURE = {"errors", "spec", "runtime/request", "runtime/pages", "runtime/prefix", "runtime/scheduler"}


def within(name: str, places: set[str]) -> bool:
    """Whether a module, named like `ops/norm`, is one of the places or lies below one."""
    return any(place in ("", name) or name.startswith(f"{place}/") for place in places)


def floor(name: str) -> str:
    return name.partition("/")[0] or "hasten"


def imports(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file, wherever it stands; relative ones are resolved."""
    here = ("hasten", *file.relative_to(package).with_suffix("").parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            yield from sorted({(node.lineno, imported(module, alias.name, package)) for alias in node.names})


def imported(module: str, name: str, package: Path) -> str:
    """What `from module import name` reaches: `module.name` where that is a module of ours, else `module`."""
    root, *below = module.split(".")
    inner = package.joinpath(*below, name)
    ours = root == "hasten" and (inner.is_dir() or inner.with_suffix(".py").is_file())
    return f"{module}.{name}" if ours else module


def allowed(name: str, module: str) -> bool:
    """Whether the module `name` of hasten/ may import the dotted `module`."""
    root, *below = module.split(".")
    if root in sys.stdlib_module_names:
        return True
    pure = within(name, PURE)
    if root != "hasten":
        return not pure and within(name, INSTALLED.get(root, set()))
    target = "/".join(below)
    if pure and not within(target, PURE):
        return False
    rights = FLOORS[floor(name)]
    return rights is EVERYTHING or floor(target) in rights | {"errors", floor(name)}


def violations(package: Path) -> list[str]:
    """Every import that the tables forbid, and every part of the tree that they do not know."""
    found: list[str] = []
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).with_suffix("").as_posix().removesuffix("__init__").rstrip("/")
        where = f"hasten/{file.relative_to(package).as_posix()}"
        if floor(name) not in FLOORS:
            found.append(f"{where}: {floor(name)!r} has no row in FLOORS")
            continue
        found += [
            f"{where}:{line}: may not import {module}"
            for line, module in imports(file, package)
            if not allowed(name, module)
        ]
    return found


def test_every_import_points_to_a_lower_floor() -> None:
    assert violations(PACKAGE) == []


def plant(root: Path, path: str, source: str) -> Path:
    """A package with every part of FLOORS, empty, and one module with the given source."""
    for name in FLOORS.keys() - {"hasten", "errors"}:
        (root / name).mkdir()
    (root / "errors.py").touch()
    (root / "runtime" / "pages.py").touch()
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(source)
    return root


@pytest.mark.parametrize(
    ("path", "source", "module"),
    [
        ("spec/block.py", "import torch", "torch"),
        ("spec/block.py", "from hasten import weights", "hasten.weights"),
        ("weights/plan.py", "from hasten.model.block import Block", "hasten.model.block"),
        ("weights/plan.py", "from ..model import block", "hasten.model"),
        ("weights/plan.py", "from .. import ops", "hasten.ops"),
        ("ops/norm.py", "import triton.language as tl", "triton.language"),
        ("ops/norm.py", "def f():\n    import triton", "triton"),
        ("families/gpt2.py", "from transformers import GPT2Config", "transformers"),
        ("families/gpt2.py", "import hasten", "hasten"),
        (
            "model/block.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import hasten.inject",
            "hasten.inject",
        ),
        ("runtime/scheduler.py", "import torch", "torch"),
        ("runtime/scheduler.py", "from hasten.runtime.llm import LLM", "hasten.runtime.llm"),
        ("runtime/scheduler.py", "from . import pages, LLM", "hasten.runtime"),
        ("inject/api.py", "import requests", "requests"),
        ("errors.py", "from hasten.spec import block", "hasten.spec"),
        ("__init__.py", "from .cli import main", "hasten.cli"),
    ],
)
def test_an_import_of_a_higher_floor_is_found(tmp_path: Path, path: str, source: str, module: str) -> None:
    line = source.count("\n") + 1
    assert violations(plant(tmp_path, path, source)) == [f"hasten/{path}:{line}: may not import {module}"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "spec/block.py",
            "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom .tower import Tower",
        ),
        ("weights/plan.py", "import torch\nfrom hasten.spec.block import Block\nfrom hasten.errors import WeightError"),
        ("ops/triton/norm.py", "import triton\nfrom hasten.ops.table import op"),
        ("inject/api.py", "import transformers\nfrom ..model import block"),
        ("runtime/scheduler.py", "import heapq\nfrom . import pages\nfrom .. import errors"),
        ("cli/__main__.py", "import hasten\nfrom hasten.server import app\nfrom transformers import AutoModel"),
        ("__init__.py", "from hasten.inject import init_inference"),
    ],
)
def test_an_import_of_a_lower_floor_is_welcome(tmp_path: Path, path: str, source: str) -> None:
    assert violations(plant(tmp_path, path, source)) == []


@pytest.mark.parametrize("path", ["helpers/strings.py", "helpers.py"])
def test_a_part_without_a_row_is_named(tmp_path: Path, path: str) -> None:
    assert violations(plant(tmp_path, path, "import math")) == [f"hasten/{path}: 'helpers' has no row in FLOORS"]
