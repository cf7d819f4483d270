"""Sampling refuses what means nothing, all of it at once; randomness is a function of its three keys."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from hasten.errors import RequestError
from hasten.runtime import Sampling
from hasten.runtime.request import uniform


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, v) for name in ("max_new_tokens", "n") for v in (0, -3, 1.5, True, "4", None)],
        *[(name, v) for name in ("min_new_tokens", "top_k", "logprobs", "seed") for v in (-1, 2.0, False)],
        *[("temperature", v) for v in (-0.1, math.nan, math.inf, "1", None, True)],
        *[("top_p", v) for v in (0, -0.5, 1.1, math.nan)],
        *[("min_p", v) for v in (-0.1, 1.1, math.nan)],
        *[("repetition_penalty", v) for v in (0, -1.0, math.inf)],
        *[(name, v) for name in ("presence_penalty", "frequency_penalty") for v in (math.nan, math.inf, "x")],
        *[("stop", v) for v in ("word", [""], [3])],
        *[("stop_tokens", v) for v in (5, [1.0], [-1], [True])],
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"sampling: {field}="):
        Sampling(**{field: value})


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(RequestError, match="max_new_tokens=-1 .*; temperature=-1 .*; stop=''"):
        Sampling(max_new_tokens=-1, temperature=-1, stop="")


def test_more_tokens_asked_for_than_allowed_are_refused() -> None:
    with pytest.raises(RequestError, match="min_new_tokens=5 exceeds max_new_tokens=4"):
        Sampling(max_new_tokens=4, min_new_tokens=5)


def test_uniform_numbers_depend_on_each_key_and_on_nothing_else() -> None:
    keys = [(seed, sample, step) for seed in (0, 1, 2**63) for sample in range(3) for step in range(50)]
    numbers = [uniform(*key) for key in keys]
    assert numbers == [uniform(*key) for key in keys]
    assert len(set(numbers)) == len(keys)


def test_uniform_numbers_are_uniform_and_never_one() -> None:
    numbers = [uniform(7, 0, step) for step in range(20000)]
    assert min(numbers) >= 0 and max(numbers) <= 1 - 2**-52
    assert abs(statistics.mean(numbers) - 0.5) < 4 / math.sqrt(12 * len(numbers))
    for low in range(10):
        share = sum(low <= 10 * x < low + 1 for x in numbers) / len(numbers)
        assert abs(share - 0.1) < 4 * math.sqrt(0.09 / len(numbers))
    pairs = statistics.correlation(numbers[1:], numbers[:-1])
    assert abs(pairs) < 4 / math.sqrt(len(numbers))
