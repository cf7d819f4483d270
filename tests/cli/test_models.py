"""`hasten models` lists every family, and the page about models is its output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hasten.cli.models import KINDS, kind
from hasten.families import FAMILIES
from tests.tiny import TINY

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_every_family_has_a_line(command: Any) -> None:
    r = command("models")
    assert r.status == 0
    lines = r.out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == sorted(FAMILIES)
    assert lines[-1] == f"{len(FAMILIES)} model types"
    assert len(FAMILIES) >= 45


def test_markdown_has_the_same_rows(command: Any) -> None:
    rows = command("models", "--markdown").out.splitlines()
    assert rows[:2] == ["| model type | kind | known as |", "| --- | --- | --- |"]
    assert [re.match(r"\| `([\w.-]+)` \|", row)[1] for row in rows[2:]] == sorted(FAMILIES)  # type: ignore[index]
    assert all(row.count("|") == 4 for row in rows)


def test_the_page_holds_the_table(command: Any) -> None:
    """Made by `hasten models --markdown`."""
    table = command("models", "--markdown").out.strip()
    assert PAGE.is_file(), f"{PAGE} is missing"
    assert table in PAGE.read_text(encoding="utf-8")


def test_every_kind_of_seam_has_a_name() -> None:
    assert {s.kind for f in FAMILIES.values() for s in f.seams.values()} <= KINDS.keys()
    named = {"gpt2": "decoder", "bert": "encoder", "t5": "encoder-decoder", "vit": "vision"}
    assert {name: kind(FAMILIES[name]) for name in named} == named
    assert "speech" in kind(FAMILIES["whisper"])


def test_every_model_type_has_a_tiny_model() -> None:
    """And so a test of its parity."""
    described = {n for n, f in FAMILIES.items() if kind(f) != KINDS["megatron"]}  # its modules have no model_type
    configs = [getattr(t.make(), "config", None) for t in TINY.values()]
    assert described - {getattr(c, "model_type", None) for c in configs} == set()
