"""Pages are handed out once, come back whole, and lie side by side where that costs nobody anything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hasten.runtime.pages import Pages

STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 12)), max_size=60)


@given(st.integers(0, 40), STEPS)
def test_every_page_is_free_or_held_by_one(limit: int, steps: list[tuple[int, int, int]]) -> None:
    pages, held = Pages(limit), {owner: list[int]() for owner in range(6)}
    for owner, count, promise in steps:
        if count == 0:
            pages.release(owner, held[owner])
            assert held[owner] == []
        else:
            before, free = held[owner].copy(), pages.free
            took = pages.take(owner, held[owner], count, promise=promise)
            assert took == (count <= free)
            assert held[owner][: len(before)] == before
            assert len(held[owner]) == len(before) + count * took
        taken = [page for mine in held.values() for page in mine]
        assert len(set(taken)) == len(taken) == limit - pages.free
        assert set(taken) <= set(range(limit))
    for owner, mine in held.items():
        pages.release(owner, mine)
    everything: list[int] = []
    assert pages.take("all", everything, limit)
    assert everything == list(range(limit))


def test_promised_owners_stay_in_one_piece_while_others_grow_between() -> None:
    pages, a, b, c = Pages(30), list[int](), list[int](), list[int]()
    for turn in range(5):
        for owner, held in (("a", a), ("b", b)):
            assert pages.take(owner, held, 2 if turn == 0 else 1, promise=6)
        assert pages.take("c", c, 1)
    assert a == list(range(6))
    assert b == list(range(6, 12))
    assert c == list(range(12, 17))


def test_a_promise_yields_its_last_page_first_when_nothing_else_is_free() -> None:
    pages, a, b = Pages(8), list[int](), list[int]()
    assert pages.take("a", a, 1, promise=8)
    assert pages.take("b", b, 3)
    assert b == [5, 6, 7]
    assert pages.take("a", a, 4)
    assert a == [0, 1, 2, 3, 4]
    assert not pages.take("a", a, 1)


def test_without_promises_the_lowest_pages_go_first() -> None:
    pages, a, b = Pages(9), list[int](), list[int]()
    assert pages.take("a", a, 3) and pages.take("b", b, 2)
    pages.release("a", a)
    assert pages.take("c", a, 4)
    assert sorted(a) == [0, 1, 2, 5]


def test_more_pages_are_handed_out_behind_those_there_were() -> None:
    pages, held = Pages(0), list[int]()
    assert not pages.take("a", held, 1)
    pages.extend(3)
    pages.extend(2)  # less than there are changes nothing
    assert pages.take("a", held, 2)
    pages.extend(5)
    assert pages.take("a", held, 3)
    assert sorted(held) == [0, 1, 2, 3, 4]
    assert (pages.free, pages.limit) == (0, 5)
    pages.release("a", held)
    assert pages.free == 5
    assert pages.take("b", held, 5)
