"""What each kind of work asks of an engine, and what its seconds mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.bench.engines import Stand
from hasten.bench.kinds import KINDS, mix, seconds
from hasten.bench.work import MEANINGS, UNITS, Work
from hasten.spec import Tokens

CPU = torch.device("cpu")


def work(kind: str, model: str = "tiny-llama", **sizes: int) -> Work:
    return Work(kind, model, torch.float32, **{"batch": 2, "prompt": 5, "new": 8, **sizes})


def do(w: Work, engine: Any) -> None:
    job = KINDS[w.kind].job(w, Stand(w.model, w.dtype, CPU), engine)
    engine.asked.clear()
    for call in job.calls:
        call()


def test_the_mix_of_requests_is_the_one_that_others_were_measured_with() -> None:
    lengths = mix(Work("offline", "llama-3.1-8b", torch.bfloat16, 600, 1024, 512))
    assert (len(lengths), sum(n for n, _ in lengths), sum(n for _, n in lengths)) == (600, 308_053, 165_403)
    assert min(min(pair) for pair in lengths) == 32


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("generate", [([5, 5], [8, 8])]),
        ("decode", [([5, 5], [1, 1]), ([5, 5], [9, 9])]),
        ("prefill", [([5, 5], [1, 1])]),
    ],
)
def test_prompts_and_completions_are_as_long_as_asked_for(kind: str, asked: object, recorder: Any) -> None:
    engine = recorder()
    do(work(kind), engine)
    assert engine.asked == asked


def test_slow_engines_decode_fewer_steps(recorder: Any) -> None:
    engine = recorder(pace=4)
    do(work("decode"), engine)
    assert engine.asked[1] == ([5, 5], [3, 3])


def test_a_step_is_what_the_prompt_leaves_of_the_time(recorder: Any) -> None:
    times = [(0.5, 2.5), (0.7, 2.7), (0.6, 2.2)]
    w = work("decode")
    assert KINDS["decode"].values(w, recorder(), times) == pytest.approx([1900 / 8, 2100 / 8, 1600 / 8])
    assert KINDS["decode"].values(w, recorder(pace=4), times) == pytest.approx([1900 / 2, 2100 / 2, 1600 / 2])


def test_rates_count_the_tokens_made(recorder: Any) -> None:
    assert KINDS["generate"].values(work("generate"), recorder(), [(0.5,), (2.0,)]) == [32.0, 8.0]
    w = work("offline", batch=7)
    assert KINDS["offline"].values(w, recorder(), [(0.5,)]) == [2.0 * sum(n for _, n in mix(w))]
    assert KINDS["prefill"].values(work("prefill"), recorder(), [(0.25,)]) == [250.0]


def test_offline_work_is_warmed_up_by_less_of_it(recorder: Any) -> None:
    w, engine = work("offline", batch=300, prompt=60, new=50), recorder()
    job = KINDS["offline"].job(w, Stand(w.model, w.dtype, CPU), engine)
    job.warm()
    assert engine.prepared == [(300, 110)]
    (lengths, new) = engine.asked.pop()
    assert lengths == [prompt for prompt, _ in mix(w)[:150]]
    assert new == [-(-n // 8) for _, n in mix(w)[:150]]
    job.calls[0]()
    assert engine.asked == [tuple(map(list, zip(*mix(w), strict=True)))]


@pytest.mark.parametrize(("model", "shapes"), [("tiny-bert", {(3, 7)}), ("tiny-vit", {(3, 3, 32, 32)})])
def test_encoders_get_what_they_read(model: str, shapes: object, recorder: Any) -> None:
    engine = recorder()
    do(work("encode", model, batch=3, prompt=7), engine)
    assert {tuple(t.shape) for t in engine.encoded[0].values()} == shapes


def test_time_per_value() -> None:
    assert seconds(work("generate"), 32.0) == 0.5
    assert seconds(work("decode"), 250.0) == 0.25


@pytest.mark.parametrize(
    ("kind", "model"), [("generate", "tiny-llama"), ("decode", "tiny-gpt2"), ("encode", "tiny-vit")]
)
def test_costs_are_told_of_everything_that_has_one(kind: str, model: str) -> None:
    stand = Stand(model, torch.float32, CPU)
    cost = KINDS[kind].cost(work(kind, model), stand.tower)
    assert len(cost) == (8 if kind == "generate" else 1)
    weights = 4 * sum(p.numel() for n, p in stand.model.named_parameters() if "embed" not in n and "pooler" not in n)
    least = weights if isinstance(stand.tower.embed, Tokens) else weights * 0.9
    assert all(c.bytes > 0.9 * least for c in cost)
    assert all(c.flops > 0 for c in cost)


def test_every_kind_has_a_meaning_and_a_unit() -> None:
    assert MEANINGS.keys() == UNITS.keys() == KINDS.keys() | {"start", "cold-start", "load"}
