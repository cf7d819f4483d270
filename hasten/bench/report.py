"""What a run found, as Markdown and as values for JSON."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from hasten.bench.ceilings import Ceilings
from hasten.bench.targets import Target
from hasten.bench.timing import Result
from hasten.bench.work import NAMES, Work


@dataclass
class Report:
    """A run so far: it can be written at any time."""

    about: Mapping[str, Any]
    targets: Sequence[Target] = ()
    source: str = ""  # of the targets' published figures
    works: list[Work] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The targets where there are any, every figure, what was left out, and the machine."""
        parts = [_aims(self.targets, self.results), self.source] if self.targets else []
        parts += [_figures(self.results), "\n".join(f"- {n}" for n in self.notes), _machine(self.about)]
        return "\n\n".join(p for p in parts if p) + "\n"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        verdicts = [{"work": str(t.work), "verdict": t.verdict(self.results)} for t in self.targets]
        told = {"machine": dict(self.about), "results": [asdict(r) for r in self.results], "notes": list(self.notes)}
        return told | ({"targets": verdicts} if self.targets else {})


def row(w: Work, results: Sequence[Result]) -> str:
    """One work's results in a line, for the screen while others are still measured."""
    told = [f"{r.engine} {figure(r.value)} {r.unit}{_percent(r)}" for r in results]
    return f"{w}: {', '.join(told) or 'nothing was measured'}"


def figure(value: float | None) -> str:
    """A number with what can be meant of it."""
    if value is None:
        return ""
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 10 else 3}f}"


def machine(ceilings: Ceilings) -> dict[str, Any]:
    """What the figures were measured on, and what it can do."""
    import transformers

    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "triton": version("triton") if gpu else None,
        "transformers": transformers.__version__,
        "memory_gb_s": round(ceilings.memory / 1e9, 1),
        **{f"{NAMES[d]}_tflop_s": round(rate / 1e12, 3) for d, rate in ceilings.matrix.items()},
    }


def _aims(targets: Sequence[Target], results: Sequence[Result]) -> str:
    head = ["work", "unit", "must", "aim", "hasten", "reached", "of the limit", "transformers here", "peers, published"]
    lines = [_line(head), _line(["---", "---", *["--:"] * 3, "---", "--:", "--:", "---"])]
    for t in targets:
        mine = {r.engine: r for r in results if r.work == str(t.work)}
        must, aim = t.bounds(mine.values())
        ours, theirs = mine.get("hasten"), mine.get("transformers")
        published = ", ".join(f"{name} {figure(v)}" for name, v in t.peers.items())
        told = [figure(must), figure(aim), figure(ours and ours.value), t.verdict(results)]
        share = f"{ours.share:.0%}" if ours and ours.share is not None else ""
        lines.append(_line([str(t.work), t.work.unit, *told, share, figure(theirs and theirs.value), published]))
    return "\n".join(lines)


def _figures(results: Sequence[Result]) -> str:
    head = ["work", "engine", "median", "least", "most", "unit", "runs", "attained", "of the limit"]
    lines = [_line(head), _line(["---", "---", *["--:"] * 3, "---", *["--:"] * 3])]
    for r in results:
        attained = "" if r.attained is None else f"{figure(r.attained)} {r.of}"
        share = "" if r.share is None else f"{r.share:.0%}"
        values = [figure(r.value), figure(r.least), figure(r.most), r.unit, str(r.runs), attained, share]
        lines.append(_line([r.work, r.engine, *values]))
    return "\n".join(lines)


def _machine(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in about.items() if v is not None)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(r: Result) -> str:
    return "" if r.share is None else f" ({figure(r.attained)} {r.of}, {r.share:.0%})"


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return f.readlines()
    except OSError:
        return []
