"""Measurements are taken in turns, warm, and told as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten.bench import timing
from hasten.bench.plot import plot
from hasten.bench.timing import Result, interleave, machine, markdown, plain, summarize
from hasten.errors import ConfigError

ABOUT = {"cpu": "some cpu", "threads": 2, "torch": "2.0", "gpu": None}
RESULTS = [Result("work one", "a", 2.0, 1.0, 4.0, "ms", 3), Result("work two", "b", 5.0, 5.0, 5.0, "ms", 1)]


def test_calls_take_turns_in_both_orders_behind_a_warm_up() -> None:
    order: list[str] = []
    steps: list[int] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = interleave(calls, 3, advance=lambda: steps.append(len(order)))
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert steps == [3, 4, 5, 6, 7, 8]
    assert {n: len(t) for n, t in times.items()} == {"a": 3, "b": 3}
    assert all(t >= 0 for row in times.values() for t in row)


def test_seconds_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    times = interleave({"slow": lambda: work(0.5), "fast": lambda: work(0.125)}, 2)
    assert times == {"slow": [0.5, 0.5], "fast": [0.125, 0.125]}


def test_medians_of_rates_and_of_milliseconds() -> None:
    times = {"a": [0.5, 0.1, 0.2]}
    assert summarize("w", times, "tokens/s", 10) == [Result("w", "a", 50.0, 20.0, 100.0, "tokens/s", 3)]
    (r,) = summarize("w", times, "ms", None)
    assert (r.value, r.least, r.most) == pytest.approx((200.0, 100.0, 500.0))


def test_a_table_and_values_for_json() -> None:
    page = markdown(RESULTS, ABOUT)
    assert "| work one | a | 2.0 | 1.0 | 4.0 | ms |" in page
    assert page.endswith("\n\ncpu some cpu, threads 2, torch 2.0\n")
    told = json.loads(json.dumps(plain(RESULTS, ABOUT)))
    assert told["machine"] == ABOUT
    assert [Result(**r) for r in told["results"]] == RESULTS


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    plot(RESULTS, ABOUT, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install hasten\[bench\]"):
        plot(RESULTS, ABOUT, tmp_path / "bars.png")


def test_the_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "bandwidth", lambda: 10.0)
    about = machine()
    assert {"cpu", "threads", "gpu", "torch", "transformers", "python", "bandwidth_gb_s"} == about.keys()
    assert about["cpu"]
    json.dumps(about)
