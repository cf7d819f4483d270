"""Pictures of a run: every work's medians, decoding against batch and context, and shares of the device's limits."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from hasten.bench.report import Report
from hasten.bench.timing import Result
from hasten.bench.work import Work
from hasten.errors import ConfigError

COLOURS = ("0.6", "0.45", "tab:orange", "tab:green", "tab:red", "tab:purple")
OURS = "tab:blue"


def plot(report: Report, path: Path) -> None:
    """Write a PNG; ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise ConfigError("--plot needs matplotlib: pip install hasten[bench]") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    results, works = report.results, {str(w): w for w in report.works}
    titles = list(dict.fromkeys(r.work for r in results))
    curves = [c for c in (_curves(results, works, axis) for axis in ("batch", "prompt")) if c]
    shares = [r for r in results if r.share is not None]
    heights = [1.4] * len(titles) + [3.0] * len(curves) + [0.22 * len(shares) + 0.8] * bool(shares)
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(8, sum(heights) + 1), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    free = iter(axes[:, 0])
    for title in titles:
        _bars(next(free), title, [r for r in results if r.work == title])
    for lines in curves:
        _lines(next(free), lines)
    if shares:
        _roofline(next(free), shares)
    about = report.about
    text = f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['torch']}"
    figure.text(0.01, 0.005, text, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(axis: Any, title: str, results: list[Result]) -> None:
    spread = [[r.value - r.least for r in results], [r.most - r.value for r in results]]
    axis.barh([r.engine for r in results], [r.value for r in results], xerr=spread, color=_colours(results))
    axis.set_title(f"{title} ({results[0].unit})", fontsize=9, loc="left")
    axis.invert_yaxis()


def _curves(
    results: list[Result], works: dict[str, Work], axis: str
) -> tuple[str, dict[str, list[tuple[int, float]]]] | None:
    """What is on the axis, and (place on it, milliseconds) of every line that has two points or more."""
    lines: dict[tuple[object, ...], list[tuple[int, float]]] = defaultdict(list)
    for r in results:
        w = works[r.work]
        if w.kind == "decode":
            fixed, at = (w.prompt, w.batch) if axis == "batch" else (w.batch, w.prompt)
            what = f"behind {fixed} tokens" if axis == "batch" else f"batch {fixed}"
            lines[r.engine, w.model, w.dtype, what].append((at, r.value))
    told = {
        f"{engine}: {model}, {what}": sorted(points)
        for (engine, model, _, what), points in lines.items()
        if len(points) > 1
    }
    name = "batch" if axis == "batch" else "tokens of context"
    return (name, told) if told else None


def _lines(axis: Any, curves: tuple[str, dict[str, list[tuple[int, float]]]]) -> None:
    name, lines = curves
    axis.set_prop_cycle(color=COLOURS)
    for label, points in lines.items():
        ours = {"color": OURS} if label.startswith("hasten:") else {}
        axis.plot(*zip(*points, strict=True), marker="o", label=label, **ours)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(bottom=0)
    axis.set_xlabel(name, fontsize=8)
    axis.set_title(f"decoding against {name} (ms a step)", fontsize=9, loc="left")
    axis.legend(fontsize=7)


def _roofline(axis: Any, results: list[Result]) -> None:
    axis.barh([f"{r.work}: {r.engine}" for r in results], [100 * (r.share or 0) for r in results])
    for bar, r in zip(axis.patches, results, strict=True):
        bar.set_color(OURS if r.engine == "hasten" else COLOURS[0])
        axis.text(
            bar.get_width(), bar.get_y() + bar.get_height() / 2, f" {r.attained:,.1f} {r.of}", fontsize=6, va="center"
        )
    axis.set_xlim(0, 120)
    axis.axvline(100, color="k", linewidth=0.8)
    axis.tick_params(axis="y", labelsize=6)
    axis.set_title("% of what the device was measured to do", fontsize=9, loc="left")
    axis.invert_yaxis()


def _colours(results: list[Result]) -> list[str]:
    others = iter(COLOURS * len(results))
    return [OURS if r.engine == "hasten" else next(others) for r in results]
