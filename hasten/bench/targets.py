"""The standard benchmark: works, what other engines were measured to need for them, and what Hasten aims at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.bench.timing import Result
from hasten.bench.work import DTYPES, Work

FILE = Path(__file__).with_name("targets.json")
RATES = ("tokens/s",)  # units of which more is better


@dataclass(frozen=True, slots=True)
class Target:
    """must and aim are in the work's unit; beside gives them as shares of a peer's time in the same run."""

    work: Work
    must: float | None = None
    aim: float | None = None
    peers: Mapping[str, float] = field(default_factory=dict)  # published figures by the engine's title
    beside: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def bounds(self, results: Iterable[Result]) -> tuple[float | None, float | None]:
        """must and aim, where the peer that they are beside has been measured."""
        for r in results:
            if r.engine in self.beside:
                must, aim = self.beside[r.engine]
                return must * r.value, aim * r.value
        return self.must, self.aim

    def verdict(self, results: Iterable[Result]) -> str:
        """aim: reached. must: that alone. MISS: neither. A dash where there is nothing to compare."""
        mine = [r for r in results if r.work == str(self.work)]
        must, aim = self.bounds(mine)
        value = next((r.value for r in mine if r.engine == "hasten"), None)
        if value is None:
            return "not measured"
        if must is None or aim is None:
            return "-"
        return "aim" if self._reached(value, aim) else "must" if self._reached(value, must) else "MISS"

    def _reached(self, value: float, bound: float) -> bool:
        return value >= bound if self.work.unit in RATES else value <= bound


def standard() -> tuple[str, list[Target]]:
    """Where the published figures come from, and the targets, works on the same model side by side."""
    told = json.loads(FILE.read_text(encoding="utf-8"))
    return told["source"], [_target(row) for row in told["rows"]]


def _target(row: Mapping[str, Any]) -> Target:
    work = Work(**{**row["work"], "dtype": DTYPES[row["work"]["dtype"]]})
    beside = {name: (must, aim) for name, (must, aim) in row.get("beside", {}).items()}
    return Target(work, row.get("must"), row.get("aim"), row["peers"], beside)
