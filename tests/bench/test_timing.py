"""Measurements are taken in turns, warm, and of those alone who can do the work."""

from __future__ import annotations

import pytest

from hasten.bench import timing
from hasten.bench.timing import Job, Result, interleave, job, result


def test_jobs_take_turns_in_both_orders_behind_a_warm_up() -> None:
    order: list[str] = []
    steps: list[int] = []
    jobs = {"a": job(lambda: order.append("a"), lambda: order.append("A")), "b": job(lambda: order.append("b"))}
    times, failures = interleave(jobs, 3, advance=lambda: steps.append(len(order)))
    assert "".join(order) == "aAb" + "aAb" + "baA" + "aAb"
    assert steps == [5, 6, 7, 9, 11, 12]
    assert {n: [len(turn) for turn in t] for n, t in times.items()} == {"a": [2, 2, 2], "b": [1, 1, 1]}
    assert all(t >= 0 for turns in times.values() for turn in turns for t in turn)
    assert failures == {}


def test_a_warm_up_of_its_own_is_not_timed() -> None:
    order: list[str] = []
    interleave({"a": Job(lambda: order.append("warm"), (lambda: order.append("work"),), lambda: None)}, 2)
    assert order == ["warm", "work", "work"]


def test_seconds_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    times, _ = interleave({"slow": job(lambda: work(0.5)), "fast": job(lambda: work(0.125), lambda: work(0.25))}, 2)
    assert times == {"slow": [(0.5,), (0.5,)], "fast": [(0.125, 0.25), (0.125, 0.25)]}


def test_who_fails_is_left_out_and_the_others_are_measured() -> None:
    def broken() -> None:
        raise MemoryError("too large")

    times, failures = interleave({"a": job(broken), "b": job(lambda: None)}, 1)
    assert times.keys() == {"b"}
    assert str(failures["a"]) == "too large"


def test_the_median_and_the_spread() -> None:
    assert result("w", "a", [5.0, 1.0, 2.0], "ms") == Result("w", "a", 2.0, 1.0, 5.0, "ms", 3)


def test_a_warm_up_goes_through_its_calls_in_rounds() -> None:
    order: list[str] = []
    made = job(lambda: order.append("one"), lambda: order.append("many"), rounds=2)
    made.warm()
    assert order == ["one", "many"] * 2
