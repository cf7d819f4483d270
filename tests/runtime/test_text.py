"""Text comes in whole characters, adds up to the decoded whole, and ends before a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.runtime.text import BROKEN, Detokenizer, Stops, Voice
from tests.runtime.toys import Portions, Words

TEXT = st.text(st.sampled_from("ab é€𝄞\n"), max_size=14)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    borders = sorted({0, len(data), *(p % (len(data) + 1) for p in places)})
    return [data[a:b] for a, b in zip(borders, borders[1:], strict=False)]


@given(TEXT, TEXT, st.lists(st.integers(0, 60), max_size=30), st.booleans())
def test_pieces_are_whole_characters_and_add_up(prompt: str, text: str, places: list[int], inside: bool) -> None:
    before = cut(("x" + prompt).encode(), [] if inside else places)
    after = cut(text.encode(), places)
    d = Detokenizer(Portions(before + after), range(len(before)))
    pieces = [d.push(len(before) + i) for i in range(len(after))]
    assert not any(BROKEN in piece for piece in pieces)
    assert "".join(pieces) == text
    assert d.flush() == ""


@given(TEXT, st.integers(1, 3), st.lists(st.integers(0, 60), max_size=30))
def test_a_character_that_is_never_finished_is_left_out(text: str, kept: int, places: list[int]) -> None:
    tokens = [b"x", *cut(text.encode() + "𝄞".encode()[:kept], places)]
    d = Detokenizer(Portions(tokens), [0])
    assert "".join([d.push(i) for i in range(1, len(tokens))]) + d.flush() == text


def test_a_character_that_the_prompt_began_is_finished() -> None:
    start, rest = "é".encode()[:1], "é".encode()[1:]
    d = Detokenizer(Portions([b"caf", start, rest + b"!"]), [0, 1])
    assert d.push(2) == "é!"


def test_the_space_before_the_first_word_stays() -> None:
    d = Detokenizer(Words(["one", "two", "three"]), [0])
    assert [d.push(1), d.push(2)] == [" two", " three"]


def test_special_tokens_have_no_text() -> None:
    d = Detokenizer(Portions([b"a", b"<end>", b"b"], frozenset({1})), [1, 0])
    assert [d.push(2), d.push(1), d.push(0), d.flush()] == ["b", "", "a", ""]


@given(TEXT, st.lists(st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=3), st.lists(st.integers(0, 14)))
def test_no_stop_string_comes_out_nor_anything_behind_it(text: str, stops: list[str], places: list[int]) -> None:
    s = Stops(stops)
    borders = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    out = "".join(s.push(text[a:b]) for a, b in zip(borders, borders[1:], strict=False))
    assert not any(stop in out for stop in stops)
    out += s.flush()
    assert text.startswith(out)
    assert s.found == any(stop in text for stop in stops)
    if not s.found:
        assert out == text
    elif len(stops) == 1:
        assert out == text[: text.index(stops[0])]
    else:
        assert any(text[len(out) :].startswith(stop) for stop in stops)


def test_what_cannot_begin_a_stop_string_is_not_held_back() -> None:
    s = Stops(["END"])
    assert [s.push(x) for x in ("a", "bE", "N", "x", "E")] == ["a", "b", "", "ENx", ""]
    assert s.flush() == "E"


@pytest.mark.parametrize("stops", [["b"], ["é"], ["zz"]])
def test_a_voice_ends_where_its_stop_string_begins(stops: list[str]) -> None:
    tokens = [b"p", b"a\xc3", b"\xa9b", b"\xc3"]
    v = Voice(Portions(tokens), [0], stops)
    said = [v.say(i) for i in (1, 2, 3)]
    assert ("".join(said) + v.end(), v.stopped) == {"b": ("aé", True), "é": ("a", True), "zz": ("aéb", False)}[stops[0]]
