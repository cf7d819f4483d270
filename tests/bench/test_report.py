"""A run is told as it was, in a table, in values and in a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hasten.bench.ceilings import Ceilings
from hasten.bench.plot import plot
from hasten.bench.report import Report, figure, machine, row
from hasten.bench.targets import Target
from hasten.bench.timing import Result
from hasten.bench.work import Work
from hasten.errors import ConfigError

ABOUT = {"cpu": "some cpu", "threads": 2, "torch": "2.0", "gpu": None}
ONE, TWO = (Work("decode", "gpt2", torch.float16, batch, new=8) for batch in (1, 2))
RESULTS = [
    Result(str(ONE), "transformers", 2.0, 1.0, 4.0, "ms", 3, 12.5, "GB/s", 0.25),
    Result(str(ONE), "hasten", 0.5, 0.4, 0.6, "ms", 3, 50.0, "GB/s", 0.999),
    Result(str(TWO), "hasten", 1234.5, 1000.0, 2000.0, "ms", 1),
]


def report() -> Report:
    targets = [Target(ONE, 1.0, 0.4, {"vLLM": 2.93}), Target(TWO, 1.0, 0.4)]
    return Report(ABOUT, targets, "measured somewhere", [ONE, TWO], RESULTS, ["vLLM left out: not here"])


def test_targets_are_told_beside_what_was_reached() -> None:
    lines = report().markdown().splitlines()
    assert f"| {ONE} | ms | 1.000 | 0.400 | 0.500 | must | 100% | 2.000 | vLLM 2.930 |" in lines
    assert f"| {TWO} | ms | 1.000 | 0.400 | 1,234 | MISS |  |  |  |" in lines
    assert "measured somewhere" in lines


def test_every_figure_and_every_note_is_told() -> None:
    page = report().markdown()
    assert f"| {ONE} | transformers | 2.000 | 1.000 | 4.000 | ms | 3 | 12.50 GB/s | 25% |" in page
    assert f"| {TWO} | hasten | 1,234 | 1,000 | 2,000 | ms | 1 |  |  |" in page
    assert "\n- vLLM left out: not here\n" in page
    assert page.endswith("\n\ncpu some cpu, threads 2, torch 2.0\n")


def test_without_targets_there_is_no_table_of_them() -> None:
    page = Report(ABOUT, works=[ONE], results=RESULTS[:1]).markdown()
    assert page.startswith("| work | engine |")
    assert "targets" not in Report(ABOUT).plain()


def test_values_for_json() -> None:
    told = json.loads(json.dumps(report().plain()))
    assert told["machine"] == ABOUT
    assert [Result(**r) for r in told["results"]] == RESULTS
    assert [t["verdict"] for t in told["targets"]] == ["must", "MISS"]
    assert told["notes"] == ["vLLM left out: not here"]


def test_a_line_for_the_screen() -> None:
    assert row(ONE, RESULTS[:2]) == (
        f"{ONE}: transformers 2.000 ms (12.50 GB/s, 25%), hasten 0.500 ms (50.00 GB/s, 100%)"
    )
    assert row(ONE, []) == f"{ONE}: nothing was measured"


@pytest.mark.parametrize(
    ("value", "told"), [(0.97654, "0.977"), (12.345, "12.35"), (123.45, "123.5"), (8087.4, "8,087"), (None, "")]
)
def test_figures_have_the_digits_that_mean_something(value: float | None, told: str) -> None:
    assert figure(value) == told


def test_the_machine_is_told(ceilings: Ceilings) -> None:
    about = machine(ceilings)
    assert about["memory_gb_s"] == 100.0
    assert about["fp16_tflop_s"] == 1.0
    assert about["cpu"]
    assert about["torch"] == torch.__version__
    json.dumps(about)


def test_a_plot_is_a_picture_that_shows_every_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn: list[list[str]] = []
    close = pyplot.close
    monkeypatch.setattr(
        pyplot, "close", lambda f: (drawn.append([a.get_title(loc="left") for a in f.axes]), close(f))[1]
    )
    plot(report(), tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == [
        [
            f"{ONE} (ms)",
            f"{TWO} (ms)",
            "decoding against batch (ms a step)",
            "% of what the device was measured to do",
        ]
    ]


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install hasten\[bench\]"):
        plot(report(), tmp_path / "bars.png")
