"""What is made ahead is not made again, the longest completions begin first, and places are counted in runs."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import RequestError
from hasten.runtime import Generator, Sampling
from hasten.runtime.request import Request
from hasten.runtime.runner import Runner
from hasten.runtime.runs import padded, sizes, slots
from hasten.runtime.scheduler import Row, Scheduler, Sequence
from tests.runtime.models import llama, transformer
from tests.runtime.test_generator import generator, prompts
from tests.runtime.test_steps import Again, Never, said
from tests.tiny import TINY, build


def tokens(g: Generator, batch: list[list[int]], s: list[Sampling]) -> list[tuple[int, ...]]:
    return [x.tokens for x in g.generate(batch, s)]


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"logprobs": 1}], ids=str)
def test_what_was_prepared_is_neither_recorded_nor_launched_again(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    t, batch, again = llama(), prompts(lengths=(30, 3, 7, 1, 9)), Again()
    s = [Sampling(max_new_tokens=n, seed=n, **how) for n in (4, 9, 1, 10, 6)]
    with generator(t) as host:
        want = tokens(host, batch, s), tokens(host, batch[:2], s[:2])
    monkeypatch.setattr(Runner, "_once", None)
    with generator(t, recorder=again, budget=24) as g:
        g.prepare(5, 40, s[0])
        made, memory = again.recorded, g.memory
        assert (tokens(g, batch, s), tokens(g, batch[:2], s[:2])) == want
        assert (again.recorded, g.memory) == (made, memory)


def test_records_are_made_for_every_number_of_tokens_that_a_pass_can_have() -> None:
    assert sizes(24) == [16, 32]
    assert sizes(4000) == sizes(2048)
    assert {padded(n) for n in range(1, 2049)} == set(sizes(2048))


def test_what_cannot_be_prepared_is_said_at_once() -> None:
    with generator(transformer(build(TINY["gpt2"])), recorder=Again()) as g:
        with pytest.raises(RequestError, match="prepare: sequences=0 is not an integer .*; tokens=2.5 is not"):
            g.prepare(0, 2.5)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="tokens=100000, but the model's table of positions has"):
            g.prepare(1, 100000)
    with pytest.raises(RequestError, match="closed"):
        g.prepare(1, 4)


def test_where_nothing_can_be_recorded_nothing_is_prepared() -> None:
    batch, s = prompts(), Sampling(max_new_tokens=4)
    with generator() as host, generator(recorder=Never()) as never:
        want = said(host, batch, s)
        for g in (host, never):
            g.prepare(5, 20)
            assert said(g, batch, s) == want


def test_the_longest_completions_of_a_call_begin_first_and_a_stream_keeps_its_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added, add = list[int](), Scheduler.add

    def counted(self: Scheduler, s: Sequence) -> None:
        added.append(s.request.index)
        add(self, s)

    monkeypatch.setattr(Scheduler, "add", counted)
    s = [Sampling(max_new_tokens=n) for n in (2, 5, 1, 9, 5)]
    with generator() as g:
        assert [(x.index, len(x.tokens)) for x in g.generate(prompts(), s)] == [(0, 2), (1, 5), (2, 1), (3, 9), (4, 5)]
        assert added == [3, 1, 4, 0, 2]
        added.clear()
        list(g.stream(prompts(), s))
        assert added == [0, 1, 2, 3, 4]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 5), st.data())
def test_slots_of_a_run_are_those_of_its_tokens(pages: list[int], size: int, data: Any) -> None:
    start = data.draw(st.integers(0, len(pages) * size - 1))
    stop = data.draw(st.integers(start + 1, len(pages) * size))
    s = Sequence(Request(0, (1,) * stop, Sampling(), 0), pages=array("i", pages))
    found = slots(Row(s, start, stop, True), size)
    assert found.tolist() == [pages[t // size] * size + t % size for t in range(start, stop)]
