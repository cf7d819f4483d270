"""Bars of a benchmark's medians, with the spread of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.bench.timing import Result
from hasten.errors import ConfigError


def plot(results: list[Result], about: Mapping[str, Any], path: Path) -> None:
    """Write a PNG; ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise ConfigError("--plot needs matplotlib: pip install hasten[bench]") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    works = list(dict.fromkeys(r.work for r in results))
    figure, axes = pyplot.subplots(len(works), 1, figsize=(8, 1.4 * len(works) + 1), squeeze=False)
    for axis, work in zip(axes[:, 0], works, strict=True):
        mine = [r for r in results if r.work == work]
        spread = [[r.value - r.least for r in mine], [r.most - r.value for r in mine]]
        axis.barh(
            [r.engine for r in mine],
            [r.value for r in mine],
            xerr=spread,
            color=["0.6", "0.45", "tab:blue"][: len(mine)],
        )
        axis.set_title(f"{work} ({mine[0].unit})", fontsize=9, loc="left")
        axis.invert_yaxis()
    figure.text(0.01, 0.005, f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
