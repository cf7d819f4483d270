"""The reader of configs: what it gives, what it remembers, what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigError
from hasten.spec.config import MATTERS, OFF, Config


def test_take_gives_the_first_name_that_is_there() -> None:
    c = Config({"a": None, "b": 0, "c": 3}, "here")
    assert c.take("a", "b", "c") == 0
    assert c.take("c") == 3


def test_take_names_everything_it_looked_for_and_where() -> None:
    with pytest.raises(ConfigError, match="^here has no width or n_embd$"):
        Config({"width": None}, "here").take("width", "n_embd")


def test_default_is_for_what_is_absent_or_none_and_not_for_what_is_false() -> None:
    c = Config({"a": None, "b": False, "c": 0}, "here")
    assert [c.default(n, 7) for n in ("a", "b", "c", "d")] == [7, False, 0, 7]


def test_choose_lists_what_it_knows() -> None:
    c = Config({"act": "swish"}, "here")
    assert c.choose("act", {"swish": 1}) == 1
    assert c.choose("absent", {"x": 2}, "x") == 2
    with pytest.raises(ConfigError, match="here: act='swish' is not one of gelu, relu"):
        c.choose("act", {"relu": 1, "gelu": 2})


def test_refuse_allows_absence_none_and_what_it_is_told() -> None:
    c = Config({"a": None, "b": "plain", "c": "fancy"}, "here")
    for name in ("a", "b", "absent"):
        c.refuse(name, "plain", why="fancy things have no description")
    with pytest.raises(ConfigError, match="here: c='fancy' is not supported, only 'plain': fancy things have no"):
        c.refuse("c", "plain", why="fancy things have no description")
    with pytest.raises(ConfigError, match="only its absence"):
        c.refuse("c", why="it must not be there")


def test_a_part_says_where_it_lies() -> None:
    with pytest.raises(ConfigError, match=r"^here\.text_config has no width$"):
        Config({"text_config": {}}, "here").part("text_config").take("width")


READERS = [
    lambda c, n: c.take(n),
    lambda c, n: c.take("absent", n),
    lambda c, n: c.default(n, None),
    lambda c, n: c.default("absent", None, n),
    lambda c, n: c.choose(n, {3: 3}),
    lambda c, n: c.refuse(n, 3, why="a reason"),
]


@given(st.sets(st.sampled_from(sorted(MATTERS))), st.sets(st.sampled_from(sorted(MATTERS))), st.data())
def test_finish_names_exactly_what_matters_is_on_and_was_not_read(
    present: set[str], read: set[str], data: st.DataObject
) -> None:
    c = Config(dict.fromkeys(present, 3) | {"of_no_matter": 3}, "here")
    for name in sorted(read & present):
        data.draw(st.sampled_from(READERS))(c, name)
    left = sorted(present - read)
    if not left:
        c.finish()
        return
    with pytest.raises(ConfigError) as caught:
        c.finish()
    assert str(caught.value).endswith(": " + ", ".join(f"{n}=3" for n in left))


@pytest.mark.parametrize("value", OFF, ids=repr)
def test_finish_lets_pass_what_is_switched_off(value: object) -> None:
    Config({"clip_qkv": value}, "here").finish()
