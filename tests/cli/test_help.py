"""Help tells every flag, and the pages name none that there is not."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

import hasten
from hasten.cli.__main__ import COMMANDS, parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def actions(name: str) -> list[argparse.Action]:
    p = argparse.ArgumentParser()
    COMMANDS[name].arguments(p)
    return [a for a in p._actions if not isinstance(a, argparse._HelpAction)]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_flag_of_a_command(name: str, command: Any) -> None:
    r = command(name, "--help")
    assert r.status == 0
    assert r.err == ""
    said = " ".join(r.out.split())
    assert " ".join((COMMANDS[name].__doc__ or "").splitlines()[0].split()) in said
    for a in actions(name):
        assert all(flag in said for flag in a.option_strings)


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_of_several_words_may_be_written_both_ways(name: str) -> None:
    for a in actions(name):
        both = {f.replace("_", "-") for f in a.option_strings} | {
            "--" + f[2:].replace("-", "_") for f in a.option_strings
        }
        assert both == set(a.option_strings)


def test_the_whole_help_lists_the_commands(command: Any) -> None:
    r = command("--help")
    assert r.status == 0
    assert all(re.search(rf"^\s+{name}\s+\w", r.out, re.MULTILINE) for name in COMMANDS)
    assert command("--version").out == f"hasten {hasten.__version__}\n"


def test_pages_name_only_commands_and_flags_that_there_are() -> None:
    known = {name: {f for a in actions(name) for f in a.option_strings} for name in COMMANDS}
    found = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in re.findall(r"^(?:    |\$ |`)?hasten ([a-z]+.*)$", text, re.MULTILINE):
            name, _, rest = line.partition("#")[0].partition(" ")
            assert name in known, f"{page.name}: hasten {line}"
            assert set(re.findall(r"(?<!\S)--[a-z_-]+", rest)) <= known[name], f"{page.name}: hasten {line}"
            found += 1
    assert found >= 5


def test_an_interface_of_argparse_is_built_once_for_all() -> None:
    assert parser().parse_args(["models"]).run is COMMANDS["models"].run
