"""A profile tells what ran, how often, and for how long beside the whole."""

from __future__ import annotations

import torch

from hasten.bench.profile import Profile, Share, profile


def test_what_ran_is_told_the_longest_first() -> None:
    a = torch.randn(200, 200)

    def call() -> None:
        for _ in range(3):
            torch.relu(torch.mm(a, a))

    found = profile(call, torch.device("cpu"))
    calls = {s.name: s.calls for s in found.shares}
    assert calls["aten::mm"] == 3
    assert calls["aten::relu"] == 3
    seconds = [s.seconds for s in found.shares]
    assert seconds == sorted(seconds, reverse=True)
    assert 0 < found.wall < 5


def test_a_table_of_the_longest() -> None:
    page = Profile(0.004, (Share("gemv" * 20, 8, 0.003), Share("settle", 2, 0.002), Share("rest", 1, 0.001))).markdown(
        "decode", 2
    )
    assert page.startswith("### decode\n\n4.00 ms; the kernels' own times add up to 6.00 ms\n")
    assert f"| `{('gemv' * 20)[:40]}` | 8 | 375.00 | 3.00 | 75.0% |" in page
    assert "| `settle` | 2 | 1,000.00 | 2.00 | 50.0% |" in page
    assert "rest" not in page
