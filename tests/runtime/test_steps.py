"""Decode steps whose state stays on the device say what passes launched by the host say, token for token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import RequestError
from hasten.model import Transformer
from hasten.runtime import Generator, Sampling
from hasten.runtime import pools as pools_module
from hasten.runtime.decoder import PATIENCE, Shape, obstacle
from hasten.runtime.graphs import Unrecordable
from hasten.runtime.runner import Runner
from tests.runtime.models import DECODERS, llama, transformer
from tests.runtime.test_generator import WORDS, generator, prompts
from tests.tiny import TINY, build

T = TypeVar("T")
WARM = {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.01}


class Again:
    """A recorder that does the work again, `most` steps at once; `recorded` and `done` count."""

    def __init__(self, most: int = 5) -> None:
        self.most, self.recorded, self.done = most, 0, 0

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        self.recorded += 1
        work()

        def again() -> T:
            self.done += 1
            return work()

        return again

    def steps(self, seconds: float | None) -> int:
        assert seconds is None or seconds > 0
        return self.most


class Never(Again):
    """Nothing can be recorded."""

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        self.recorded += 1
        raise Unrecordable("the device has no memory left for it")


def said(g: Generator, batch: list[list[int]], s: Any) -> list[tuple[Any, ...]]:
    """What is compared of every completion."""
    return [(x.index, x.sample, x.tokens, x.text, x.finish_reason, x.likeliest) for x in g.generate(batch, s)]


def near(got: list[tuple[Any, ...]], want: list[tuple[Any, ...]]) -> None:
    """The same completions, with logarithms as near: a recorded pass is padded, so that other kernels may serve it."""
    assert [x[:-1] for x in got] == [x[:-1] for x in want]
    for (*_, some), (*_, others) in zip(got, want, strict=True):
        assert list(some or ()) == [pytest.approx(x, abs=1e-5) for x in others or ()]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_of_every_decoder(name: str) -> None:
    t, batch, again = transformer(build(TINY[name])), prompts(name), Again()
    s = [Sampling(max_new_tokens=n) for n in (14, 3, 9, 1, 12)]
    with generator(t) as host, generator(t, recorder=again) as device:
        want = said(host, batch, s)
        for _ in range(2):  # what is the prompts' is recorded when it comes again
            assert said(device, batch, s) == want
    assert (again.done > 0) == (obstacle(t) is None)


KINDS: dict[str, list[Sampling]] = {
    "temperature": [Sampling(max_new_tokens=11, temperature=0.3 * i, seed=i) for i in range(5)],
    "filters": [Sampling(max_new_tokens=11, seed=i, **WARM) for i in range(5)],
    "all kinds": [
        Sampling(max_new_tokens=5),
        Sampling(max_new_tokens=12, temperature=1.5, seed=1),
        Sampling(max_new_tokens=9, seed=2, **WARM),
        Sampling(max_new_tokens=3, temperature=0.9, top_k=4, seed=3),
        Sampling(max_new_tokens=7, temperature=2.0, top_p=0.7, seed=4),
    ],
    "penalties": [Sampling(max_new_tokens=8, repetition_penalty=1.4), *[Sampling(max_new_tokens=12)] * 4],
    "logprobs": [Sampling(max_new_tokens=6, logprobs=2, temperature=1.0, seed=2), *[Sampling(max_new_tokens=12)] * 4],
    "several": [Sampling(max_new_tokens=8, temperature=1.5, seed=1, n=3), *[Sampling(max_new_tokens=5, n=2)] * 4],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 7])
def test_every_way_of_choosing(kind: str, most: int) -> None:
    t, batch, again = llama(), prompts(), Again(most)
    with generator(t) as host, generator(t, recorder=again) as device:
        want = said(host, batch, KINDS[kind])
        for _ in range(2):
            near(said(device, batch, KINDS[kind]), want)
    assert again.done > 0


def test_ways_of_choosing_that_follow_each_other() -> None:
    t = llama()
    with generator(t) as host, generator(t, recorder=Again(4)) as device:
        for times, kind in enumerate(("greedy", "logprobs", "greedy", "penalties", "temperature")):
            s = KINDS.get(kind, [Sampling(max_new_tokens=12)] * 5)
            batch = prompts(lengths=(5, 81 - 20 * times, 1, 9, 13))  # no shape of prompts comes twice, no pool moves
            near(said(device, batch, s), said(host, batch, s))


def test_sequences_that_end_by_themselves_leave_those_beside_them_alone() -> None:
    t, batch, again = llama(), prompts(), Again(6)
    s = Sampling(max_new_tokens=40)
    with generator(t) as g:
        free = [x.tokens for x in g.generate(batch, s)]
    ends = [[tokens[3 + 7 * i]] for i, tokens in enumerate(free)]  # in the first burst, and in those begun blindly
    each = [Sampling(max_new_tokens=40, stop_tokens=end) for end in ends]
    with generator(t) as host, generator(t, recorder=again) as device:
        want = said(host, batch, each)
        assert {reason for *_, reason, _ in want} == {"stop"}
        for _ in range(2):
            assert said(device, batch, each) == want
        assert device._runner.pages.free == device._runner.pages.limit


def test_stop_tokens_least_lengths_and_stop_strings_end_inside_a_burst() -> None:
    t, batch = llama(), prompts()
    with generator(t) as g:
        free = [x.tokens for x in g.generate(batch, Sampling(max_new_tokens=12))]
    ends = sorted({tokens[4] for tokens in free})
    for most in (3, 32):
        ours = generator(t, eos=ends, tokenizer=WORDS, recorder=Again(most))
        with generator(t, eos=ends, tokenizer=WORDS) as host, ours as device:
            word = f"w{free[0][2]} "
            for s in (
                Sampling(max_new_tokens=12),
                Sampling(max_new_tokens=12, min_new_tokens=7),
                Sampling(max_new_tokens=12, ignore_eos=True, stop=[word]),
                [Sampling(max_new_tokens=12, stop=[word]), *[Sampling(max_new_tokens=9, ignore_eos=True)] * 4],
            ):
                want = said(host, batch, s)
                assert said(device, batch, s) == want
                assert "stop" in {reason for *_, reason, _ in want}


@given(
    sizes=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 9)), min_size=1, max_size=6),
    pages=st.integers(6, 24),
    budget=st.integers(1, 12),
    most=st.integers(1, 9),
    places=st.integers(1, 6),
)
def test_whatever_the_memory_the_budget_and_the_places(
    sizes: list[tuple[int, int]], pages: int, budget: int, most: int, places: int
) -> None:
    t = SHARED
    batch = [[3 + (7 * i + j) % 60 for j in range(n)] for i, (n, _) in enumerate(sizes)]
    s = [Sampling(max_new_tokens=new, temperature=i % 2 * 1.0, seed=i) for i, (_, new) in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hasten.runtime.runner.PLACES", places)
        with generator(t) as host, generator(t, pages, budget=budget, recorder=Again(most)) as device:
            want = said(host, batch, s)
            assert said(device, batch, s) == want
            assert said(device, batch, s) == want
            assert device._runner.pages.free == device._runner.pages.limit


SHARED = llama()


def test_a_batch_that_changes_size_records_each_shape_once() -> None:
    t, again = llama(), Again(4)
    batch = prompts(lengths=(5, 4, 3, 6, 2, 7, 1))
    with generator(t) as host, generator(t, recorder=again) as device:
        for _ in range(2):
            for size in (1, 7, 2, 4, 3):
                s = Sampling(max_new_tokens=6)
                assert said(device, batch[:size], s) == said(host, batch[:size], s)
        decoder = device._runner.decoder
        assert decoder is not None
        shapes = [shape for shape, _ in decoder._records]
        assert again.recorded == len(shapes) == len(set(shapes))
        assert {shape.places for shape in shapes if not shape.tokens} >= {1, 8}
        assert f"{len(shapes)} records so far" in device.decoding


def test_pools_that_move_void_what_was_recorded() -> None:
    t, again = llama(), Again(4)
    with generator(t, 3000) as host, generator(t, 3000, recorder=again) as device:
        four, long = [[5] * 6, [7, 8, 9], [6], [9, 4]], [[5] * 2000, [7, 8, 9]]
        for batch in (four, long, four):
            assert said(device, batch, Sampling(max_new_tokens=6)) == said(host, batch, Sampling(max_new_tokens=6))
        assert (
            again.recorded == 4
        )  # four places; behind the move pieces of the prompt and two wide ones; and four again


def test_a_larger_record_serves_a_shape_that_comes_up_seldom() -> None:
    t, again = llama(), Again(4)
    batch, s = prompts(lengths=(5, 4, 3)), Sampling(max_new_tokens=5)
    with generator(t) as host, generator(t, recorder=again) as device:
        assert said(device, batch, s) == said(host, batch, s)
        assert again.recorded == 1
        for bursts in range(2, PATIENCE + 4, 2):
            assert said(device, batch[:1], s) == said(host, batch[:1], s)
            decoder = device._runner.decoder
            assert decoder is not None
            steps = [shape for shape, _ in decoder._records if not shape.tokens]
            assert len(steps) == (1 if bursts <= PATIENCE else 2)


def test_as_many_steps_are_handed_over_as_the_record_that_serves_has_time_for() -> None:
    class Timed(Again):
        def steps(self, seconds: float | None) -> int:
            asked.append(seconds)
            return super().steps(seconds)

    asked: list[float | None] = []
    batch, s = prompts(lengths=(5, 4, 3)), Sampling(max_new_tokens=9)
    with generator(recorder=Timed(4)) as g:
        g.generate(batch, s)
        asked.clear()
        g.generate(batch[:1], s)
        assert asked and None not in asked, "one sequence, which the record of four places serves"


def test_a_table_that_outgrows_its_columns_goes_on_in_a_wider_one() -> None:
    t, again = llama(), Again(32)
    with generator(t) as host, generator(t, recorder=again) as device:  # pages of four: 32 of them end at 128 tokens
        s = Sampling(max_new_tokens=90)
        assert said(device, [[5] * 60, [9] * 3], s) == said(host, [[5] * 60, [9] * 3], s)
        assert again.recorded == 2


def test_the_last_position_of_a_table_is_used_and_none_behind_it() -> None:
    t, again = transformer(build(TINY["gpt2"])), Again(32)
    last = t.weights["positions"].shape[0]
    batch = [[5] * (last - 20), [7] * 4]
    s = [Sampling(max_new_tokens=20), Sampling(max_new_tokens=last - 4)]
    with generator(t, 2 * last) as host, generator(t, 2 * last, recorder=again) as device:
        assert said(device, batch, s) == said(host, batch, s)


def test_two_streams_share_the_records_and_nothing_else() -> None:
    t, s = llama(), Sampling(max_new_tokens=9)
    one, two = prompts(lengths=(5, 2)), prompts(lengths=(6, 3))
    with generator(t, recorder=Again(3)) as g:
        want = [[x.tokens for x in g.generate(p, s)] for p in (one, two)]
        pair = list(zip(g.stream(one, s), g.stream(two, s), strict=True))
    for side in (0, 1):
        for i in range(2):
            assert tuple(e[side].token for e in pair if e[side].index == i) == want[side][i]


def test_passes_of_many_tokens_meet_in_few_records() -> None:
    t, again = llama(), Again(2)
    batch = prompts(lengths=tuple(1 + 37 * i % 150 for i in range(40)))
    s = [Sampling(max_new_tokens=1 + 23 * i % 31, temperature=i % 2 * 1.0, seed=i) for i in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hasten.runtime.runner.PLACES", 24)
        with generator(t, 2000) as host, generator(t, 2000, recorder=again) as device:
            want = said(host, batch, s)
            for _ in range(3):
                assert said(device, batch, s) == want
            decoder = device._runner.decoder
            assert decoder is not None
            wide = [shape for shape, _ in decoder._records if shape.tokens > 256]
            assert wide == [Shape(512, 16, 128), Shape(512, 256, 128)]


@pytest.mark.parametrize("kind", ["greedy", "filters"])
def test_once_recorded_every_pass_begins_before_the_one_in_front_of_it_is_heard(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, batch = llama(), prompts(lengths=(5, 9, 3, 21, 2, 7, 1, 13, 4, 6, 30, 2))
    more = WARM if kind == "filters" else {}
    with generator(t) as g:
        free = [x.tokens for x in g.generate(batch, [Sampling(max_new_tokens=12, seed=i, **more) for i in range(12)])]
    s = [
        Sampling(max_new_tokens=2 + i, seed=i, stop_tokens=[tokens[-1]] if i % 3 else (), **more)
        for i, tokens in enumerate(free)
    ]
    begun: dict[str, int] = {"start": 0, "follow": 0}

    def counted(name: str) -> Callable[..., Any]:
        whole = getattr(Runner, name)

        def call(*args: Any) -> Any:
            work = whole(*args)
            begun[name] += work is not None
            return work

        return call

    for name in begun:
        monkeypatch.setattr(Runner, name, counted(name))
    monkeypatch.setattr("hasten.runtime.runner.PLACES", 4)
    with generator(t) as host, generator(t, budget=24, recorder=Again(4)) as device:
        want = said(host, batch, s)
        for _ in range(4):
            begun.update(start=0, follow=0)
            assert said(device, batch, s) == want
    assert begun["follow"] > 12 and begun["start"] == 1


def test_the_next_burst_runs_while_the_last_is_told_and_a_dropped_stream_frees_its_pages() -> None:
    again = Again(4)
    with generator(recorder=again) as g:
        events: Any = g.stream([[5, 6]], Sampling(max_new_tokens=13))
        next(events)  # the prompt's token, behind which the first burst has begun
        assert again.done == 4
        next(events)  # the first burst's, behind which half a one has begun before it was waited for
        assert again.done == 4 + 2
        assert g._runner.pages.free < g._runner.pages.limit
        events.close()
        assert g._runner.pages.free == g._runner.pages.limit
        g.generate([[5, 6]], Sampling(max_new_tokens=13))
        assert again.done == 6 + 12 + 1  # the prompt, whose shape came up for the second time


def test_closing_ends_a_stream_inside_a_burst() -> None:
    g = generator(recorder=Again(4))
    events = g.stream([[5, 6]], Sampling(max_new_tokens=9))
    next(events)
    next(events)
    g.close()
    assert g.memory == 0
    with pytest.raises(RequestError, match="closed"):
        next(events)


def test_logits_that_are_not_numbers_are_an_error_behind_the_tokens_that_were_sound() -> None:
    t = llama()
    with generator(t, recorder=Again(4)) as g:
        events = g.stream([[5, 6]], Sampling(max_new_tokens=9))
        next(events)
        t.weights["final_norm.weight"].fill_(torch.nan)
        assert [next(events).token for _ in range(4)]
        with pytest.raises(RequestError, match="prompt 0: the model's logits for token 7 are not numbers"):
            next(events)


def test_what_cannot_be_recorded_is_launched_and_the_reason_kept() -> None:
    t, never, batch = llama(), Never(), prompts()
    with generator(t) as host, generator(t, recorder=never) as device:
        for _ in range(3):
            assert said(device, batch, Sampling(max_new_tokens=5)) == said(host, batch, Sampling(max_new_tokens=5))
        assert "not 8 places: the device has no memory left for it" in device.decoding
        assert never.recorded == 2, "the steps, and the prompts when they came again"


@pytest.mark.parametrize("name", ["llama-dynamic", "falcon-rw"])
def test_towers_with_an_obstacle_are_launched_and_say_so(name: str) -> None:
    t, again, batch = transformer(build(TINY[name])), Again(), prompts(name)
    assert obstacle(t) is not None
    with generator(t) as host, generator(t, recorder=again) as device:
        assert said(device, batch, Sampling(max_new_tokens=6)) == said(host, batch, Sampling(max_new_tokens=6))
        assert str(obstacle(t)) in device.decoding
    assert again.recorded == 0
    forced = Transformer(SHARED.tower, SHARED.weights, {1: "reference"})
    assert obstacle(forced) == "1 blocks fell back to another backend"


def test_memory_that_cannot_be_had_rejects_one_request_and_serves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pools_module._grown

    def scarce(pool: torch.Tensor, pages: int) -> torch.Tensor:
        if pages > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(pool, pages)

    t, batch = llama(), [[5] * 50, [7, 8, 9], [6] * 20]
    with generator(t) as g:
        want = g.generate(batch, Sampling(max_new_tokens=5))
    monkeypatch.setattr(pools_module, "_grown", scarce)
    with generator(t, recorder=Again(4)) as g:
        got = g.generate(batch, Sampling(max_new_tokens=5))
        assert g._runner.pools.pages >= 6
    assert [x.finish_reason for x in got] == ["rejected", "length", "length"]
    assert "need 14 pages" in str(got[0].error)
    assert [x.tokens for x in got[1:]] == [x.tokens for x in want[1:]]
