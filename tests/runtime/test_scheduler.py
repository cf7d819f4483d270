"""The scheduler finishes every sequence, in whatever memory, and neither leaks nor shares a page."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import RequestError
from hasten.runtime.pages import Pages
from hasten.runtime.request import Request, Sampling
from hasten.runtime.runs import padded
from hasten.runtime.scheduler import HOLD, Row, Scheduler, Sequence


def sequence(index: int, prompt: int, new: int) -> Sequence:
    return Sequence(Request(index, (0,) * prompt, Sampling(max_new_tokens=new), 0))


@dataclass
class Cache:
    """What a model would have in its pages: which token of which sequence, and how long that was when it ran."""

    size: int
    slots: dict[int, tuple[Sequence, int, int]] = field(default_factory=dict)

    def run(self, rows: list[Row], restarts: frozenset[int], steps: int = 1) -> None:
        for step, row in product(range(steps), rows):
            s, stop = row.sequence, row.stop + step
            for at in range(row.start if step == 0 else stop - 1, stop):
                self.slots[self.slot(s, at)] = s, at, s.length
            for at in range(stop):
                owner, token, length = self.slots[self.slot(s, at)]
                assert (owner, token) == (s, at), "attention would see another token"
                assert all((length > r) == (s.length > r) for r in restarts), "a key of another length's rope"

    def slot(self, s: Sequence, at: int) -> int:
        return s.pages[at // self.size] * self.size + at % self.size


Ends = Callable[[Sequence, int], bool]
"""Whether a sequence stops at so many tokens."""


def no_end(s: Sequence, length: int) -> bool:
    return False


SIZES = st.lists(st.tuples(st.integers(1, 14), st.integers(1, 9)), min_size=1, max_size=8)


RESTARTS = st.sets(st.integers(1, 20), max_size=2)


@given(SIZES, st.integers(1, 24), st.integers(1, 5), st.integers(1, 12), st.booleans(), RESTARTS)
def test_every_sequence_finishes_or_is_refused_and_no_page_leaks(
    sizes: list[tuple[int, int]], limit: int, size: int, budget: int, promise: bool, restarts: set[int]
) -> None:
    pages, cache = Pages(limit), Cache(size)
    scheduler = Scheduler(pages, size, budget, restarts=frozenset(restarts), promise=promise)
    alive, finished = list[Sequence](), list[Sequence]()
    for i, (prompt, new) in enumerate(sizes):
        s, fits = sequence(i, prompt, new), -(-(prompt + new - 1) // size) <= limit
        if fits:
            scheduler.add(s)
            alive.append(s)
        else:
            told = f"prompt {i}: {prompt} tokens and {new} new ones need .* allows {limit}"
            pytest.raises(RequestError, scheduler.add, s).match(told)
    for _ in range(3000):
        if not (scheduler.running or scheduler.waiting):
            break
        before = {s for s in scheduler.running if s.cached}
        rows = scheduler.next()
        assert rows, "no progress"
        again = [row.sequence for row in rows if row.start == 0 and row.sequence in before]
        assert all(len(s.tokens) - 1 in restarts for s in again), "what gave way came back at once"
        check(scheduler, rows, alive)
        cache.run(rows, frozenset(restarts))
        scheduler.advance(rows, 1)
        finished += hear(scheduler, rows)
    assert set(finished) == set(alive)
    assert pages.free == limit


def hear(scheduler: Scheduler, rows: list[Row], steps: int = 1, ends: Ends = no_end) -> list[Sequence]:
    """Tokens of so many steps, up to each sequence's end; those that have come to it."""
    over = list[Sequence]()
    for s in [row.sequence for row in rows if row.samples and not row.sequence.ended]:
        new = min(steps, s.limit - len(s.tokens))
        stop = next((i for i in range(1, new + 1) if ends(s, len(s.tokens) + i)), 0)
        s.hear([0] * (stop or new))
        if stop or len(s.tokens) == s.limit:
            scheduler.finish(s)
            over.append(s)
    return over


@given(
    SIZES,
    st.integers(1, 24),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
)
def test_passes_that_begin_before_the_last_one_is_heard_neither_leak_nor_share_a_page(
    sizes: list[tuple[int, int]], limit: int, size: int, budget: int, most: int, places: int, stops: bool, apart: bool
) -> None:
    """apart: two passes have nothing to do with each other, and one step each, as stages want them."""
    pages, cache = Pages(limit), Cache(size)
    scheduler = Scheduler(pages, size, budget, places=places, lanes=2 if apart else 1)
    lines = [sequence(i, *n) for i, n in enumerate(sizes) if -(-(sum(n) - 1) // size) <= limit]
    for s in lines:
        scheduler.add(s)

    def ends(s: Sequence, length: int) -> bool:
        return stops and random.Random(s.request.index * 99 + length).random() < 0.3

    under_way, finished = list[tuple[list[Row], int]](), list[Sequence]()
    for _ in range(3000):
        if not (scheduler.running or scheduler.waiting or under_way):
            break
        if len(under_way) == 2:
            rows, steps = under_way.pop(0)
            finished += hear(scheduler, rows, steps, ends)
        rows = scheduler.next()
        if not rows:
            assert under_way, "no progress"
            rows, steps = under_way.pop(0)
            finished += hear(scheduler, rows, steps, ends)
            continue
        check(scheduler, rows, lines)
        last = [row.sequence for row in under_way[-1][0] if row.samples] if under_way else []
        unheard = [row for row in rows if row.stop > len(row.sequence.tokens)]
        assert all(row.sequence in last and row.stop - row.start == 1 for row in unheard), "who says these tokens?"
        assert not (apart and unheard), "no pass tells another"
        single = not apart and all(row.samples and row.stop - row.start == 1 for row in rows)
        steps = scheduler.ahead(rows, most) if single else 1
        cache.run(rows, frozenset(), steps)
        scheduler.advance(rows, steps)
        under_way.append((rows, steps))
    assert set(finished) == set(lines)
    assert pages.free == limit


def check(scheduler: Scheduler, rows: list[Row], alive: list[Sequence]) -> None:
    """What holds of every pass."""
    assert sum(row.stop - row.start for row in rows) <= scheduler.budget
    assert len({row.sequence for row in rows}) == len(rows)
    for row in rows:
        assert row.sequence in scheduler.running
        assert row.start == row.sequence.cached < row.stop <= row.sequence.length
        assert len(row.sequence.pages) * scheduler.page_size >= row.stop
    held = [page for s in alive for page in s.pages]
    assert len(set(held)) == len(held) == scheduler.pages.limit - scheduler.pages.free
    assert all(not s.pages and not s.cached for s in scheduler.waiting)


def test_the_oldest_always_gets_on() -> None:
    scheduler = Scheduler(Pages(4), 1, 8)
    old, young = sequence(0, 1, 4), sequence(1, 2, 2)
    scheduler.add(old), scheduler.add(young)
    passes = []
    while scheduler.running or scheduler.waiting:
        rows = scheduler.next()
        passes.append([row.sequence.request.index for row in rows])
        scheduler.advance(rows, 1)
        hear(scheduler, rows)
    first = [p for p in passes if 0 in p]
    assert len(first) == 4 and passes[:4] == first
    assert scheduler.pages.free == 4


def test_a_long_prompt_runs_in_chunks_beside_a_token_of_each_running_sequence() -> None:
    scheduler = Scheduler(Pages(100), 4, 5)
    short, long = sequence(0, 2, 9), sequence(1, 12, 1)
    scheduler.add(short), scheduler.add(long)
    seen = []
    for _ in range(4):
        rows = scheduler.next()
        seen.append([(row.sequence.request.index, row.start, row.stop, row.samples) for row in rows])
        scheduler.advance(rows, 1)
        hear(scheduler, rows)
    assert seen[0] == [(0, 0, 2, True), (1, 0, 3, False)]
    assert seen[1] == [(0, 2, 3, True), (1, 3, 7, False)]
    assert seen[3] == [(0, 4, 5, True), (1, 11, 12, True)]


def test_a_prompt_that_exactly_fits_is_served_and_one_token_more_is_not() -> None:
    scheduler = Scheduler(Pages(3), 4, 8)
    scheduler.add(sequence(0, 12, 1))  # the new token is never looked back at
    with pytest.raises(RequestError, match="prompt 1: 12 tokens and 2 new ones need 4 pages of 4 tokens; .* allows 3"):
        scheduler.add(sequence(1, 12, 2))


def test_clear_takes_everything_back() -> None:
    pages = Pages(9)
    scheduler = Scheduler(pages, 2, 6)
    for i in range(4):
        scheduler.add(sequence(i, 4, 3))
    scheduler.advance(scheduler.next(), 1)
    assert scheduler.running and scheduler.waiting and pages.free < 9
    scheduler.clear()
    assert not scheduler.running and not scheduler.waiting and pages.free == 9


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(1, 5),
)
def test_steps_ahead_have_their_pages_and_take_nobody_elses(sizes: list[tuple[int, int]], most: int, size: int) -> None:
    pages = Pages(60)
    scheduler = Scheduler(pages, size, 512)
    lines = [sequence(i, prompt, new) for i, (prompt, new) in enumerate(sizes)]
    for s in lines:
        scheduler.add(s)
    rows = scheduler.next()
    scheduler.advance(rows, 1)
    hear(scheduler, rows)
    rows = scheduler.next()
    if not rows or any(row.stop - row.start > 1 for row in rows):
        return
    running = scheduler.running.copy()
    steps = scheduler.ahead(rows, most)
    assert 1 <= steps <= min(most, max(row.sequence.limit - row.stop for row in rows))
    assert scheduler.running == running
    assert all(len(row.sequence.pages) * size >= row.stop + steps - 1 for row in rows)
    held = [page for s in lines for page in s.pages]
    assert len(set(held)) == len(held) == pages.limit - pages.free
    if pages.free >= 8 * len(rows) and most > 1:
        assert steps > 1 or all(row.stop + 1 >= row.sequence.limit for row in rows)


def test_no_more_sequences_run_than_there_are_places() -> None:
    scheduler = Scheduler(Pages(100), 4, 100, places=2)
    lines = [sequence(i, 3, 2) for i in range(4)]
    for s in lines:
        scheduler.add(s)
    assert [row.sequence for row in scheduler.next()] == lines[:2]
    scheduler.finish(lines[0])
    assert [row.sequence for row in scheduler.next()] == [lines[1], lines[2]]


# ---- admission in company


def mix(requests: int) -> list[tuple[int, int]]:
    """Lengths of prompts and completions, uniform."""
    r = random.Random(0)
    return [(r.randint(32, 1024), r.randint(32, 512)) for _ in range(requests)]


def took(hold: int) -> tuple[float, float]:
    """Milliseconds of 600 requests in 256 places, with prompts that wait for others for so many passes: where passes
    with prompts in them are launched, and where they are recorded. A step of n sequences takes 5.5 + 0.041 n."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hasten.runtime.scheduler.HOLD", hold)
        scheduler, time = Scheduler(Pages(40000), 16, 2048, places=256), [0.0, 0.0]
        for i, n in enumerate(mix(600)):
            scheduler.add(sequence(i, *n))
        while scheduler.running or scheduler.waiting:
            rows = scheduler.next()
            tokens = sum(row.stop - row.start for row in rows)
            mixed, step = tokens > len(rows), 5.5 + 0.041 * len(rows)
            time[0] += max(6 + 0.025 * tokens, 40) + 4 if mixed else step  # 40 of the host, which hears first
            time[1] += 6 + 0.025 * padded(tokens) if mixed else step
            scheduler.advance(rows, 1)
            hear(scheduler, rows)
    return time[0], time[1]


def test_company_pays_where_passes_are_launched_and_costs_nothing_where_they_are_recorded() -> None:
    (launched, recorded), (launched_alone, recorded_alone) = took(HOLD), took(0)
    assert launched < 0.93 * launched_alone
    assert recorded < 1.002 * recorded_alone


@given(SIZES, st.integers(2, 8), st.integers(4, 40))
def test_nobody_waits_for_company_longer_than_the_constant_says(
    sizes: list[tuple[int, int]], places: int, budget: int
) -> None:
    scheduler = Scheduler(Pages(1000), 4, budget, places=places)
    for i in range(24):
        scheduler.add(sequence(i, *sizes[i % len(sizes)]))
    held = 0
    while scheduler.running or scheduler.waiting:
        rows = scheduler.next()
        room = budget - sum(row.stop - row.start for row in rows)
        could = bool(scheduler.waiting) and room > 0 and len(scheduler.running) < places
        held = held + 1 if could else 0
        assert held <= HOLD
        assert not could or 2 * len(scheduler.running) >= places, "few run, and one had to wait"
        scheduler.advance(rows, 1)
        hear(scheduler, rows)


def test_whoever_comes_to_free_places_starts_at_once() -> None:
    scheduler = Scheduler(Pages(1000), 4, 512, places=4)
    for i in range(3):
        scheduler.add(sequence(i, 3, 9))
    scheduler.advance(rows := scheduler.next(), 1)
    hear(scheduler, rows)
    scheduler.add(sequence(3, 3, 9))
    assert len(scheduler.next()) == 4, "nobody else is there to wait for"


def test_prompts_that_wait_for_company_start_together() -> None:
    scheduler = Scheduler(Pages(1000), 4, 32, places=4)
    for i, new in enumerate((2, 3, 9, 9, 9, 9, 9)):
        scheduler.add(sequence(i, 8, new))
    passes = []
    for _ in range(5):
        rows = scheduler.next()
        passes.append([row.sequence.request.index for row in rows])
        scheduler.advance(rows, 1)
        hear(scheduler, rows)
    assert passes == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3], [2, 3, 4, 5], [2, 3, 4, 5]]
