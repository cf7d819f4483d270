"""Bad prompts are refused before a token is made, by name, position and number, all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from hasten.errors import RequestError
from hasten.runtime import Generator, Sampling
from tests.runtime.models import transformer
from tests.runtime.toys import Words
from tests.tiny import TINY, build

SIX = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def gpt2() -> Iterator[Generator]:
    with Generator(transformer(build(TINY["gpt2"])), memory_limit=2**20, max_tokens=60) as g:
        yield g


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts: the batch is empty"),
        (torch.empty(0, 4, dtype=torch.long), "no prompts: the batch is empty"),
        ([[]], "prompt 0: it is empty"),
        ([torch.empty(0, dtype=torch.long)], "prompt 0: it is empty"),
        ([[1, 67]], "prompt 0: token 67 at position 1 is outside 0 to 66"),
        ([[1], [-1, 2, 900]], "prompt 1: token -1 at position 0 .*; prompt 1: token 900 at position 2"),
        ([[1, 2.0]], "prompt 0: 2.0 at position 1 is no token id"),
        ([[True]], "prompt 0: True at position 0 is no token id"),
        ([[numpy.bool_(True)]], "at position 0 is no token id"),
        ([[None, "a"]], "None at position 0 is no token id; prompt 0: 'a' at position 1"),
        ([1, 2], "prompt 0: 1 is not a list of token ids; prompt 1: 2 is not"),
        ([b"ab"], "is not a list of token ids"),
        ([torch.tensor([1.0])], r"tensor of integers with one axis, not torch.float32 \(1,\)"),
        ([torch.tensor([True])], r"not torch.bool \(1,\)"),
        (torch.ones(1, 2, 2).long(), r"not torch.int64 \(2, 2\)"),
        (["text"], "prompt 0: text needs a tokenizer"),
        ("text", "one string, not a list"),
        ([[5] * 60], "prompt 0: its 60 tokens leave no room for a new one: max_tokens is 60"),
        ([[5] * 64], "its 64 tokens leave no room for a new one: the model's table of positions has 64"),
        ([[5] * 100], "its 100 tokens leave no room .* positions has 64; .* max_tokens is 60"),
        ([[1], [5] * 55], "prompt 1: 55 tokens and max_new_tokens=6 make 61, but max_tokens is 60"),
        ([[5] * 59], "59 tokens and max_new_tokens=6 make 65, but the model's table of positions has 64"),
    ],
)
def test_a_bad_prompt_is_refused(gpt2: Generator, prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        gpt2.generate(prompts, SIX)
    with pytest.raises(RequestError, match=message):
        gpt2.stream(prompts, SIX)  # at once, not at the first event
    assert gpt2.memory == 0


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ([SIX], "1 samplings for 2 prompts"),
        ([SIX] * 3, "3 samplings for 2 prompts"),
        ([SIX, None], "sampling 1 is None"),
        ([SIX, {"temperature": 1}], "sampling 1 is {'temperature': 1}"),
        (Sampling(stop_tokens=[3, 70], max_new_tokens=1), "stop token 70 is outside 0 to 66"),
        (Sampling(stop=["x"], max_new_tokens=1), "stop strings need a tokenizer"),
    ],
)
def test_bad_sampling_is_refused(gpt2: Generator, sampling: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        gpt2.generate([[1], [2]], sampling)


def test_every_form_of_a_prompt_gives_the_same(gpt2: Generator) -> None:
    ids = [5, 9, 11]
    tensors = [torch.tensor(ids), torch.tensor(ids, dtype=torch.int32), list(torch.tensor(ids))]
    forms = [ids, tuple(ids), *tensors, numpy.array(ids), range(5, 12, 2)]
    answers = gpt2.generate(forms, SIX)
    assert len({g.tokens for g in answers[:6]}) == 1
    assert [list(g.prompt) for g in answers] == [ids] * 6 + [[5, 7, 9, 11]]
    assert gpt2.generate(torch.tensor([ids, ids]), SIX)[1].tokens == answers[0].tokens


def test_the_longest_that_fits_the_position_table_is_served() -> None:
    with Generator(transformer(build(TINY["gpt2"])), memory_limit=2**20) as g:
        (got,) = g.generate([[5] * 58], SIX)
    assert len(got.tokens) == 6


def test_a_string_that_has_no_tokens_is_refused() -> None:
    told = "prompt 1: the tokenizer makes no tokens of ' '"
    with Generator(transformer(build(TINY["gpt2"])), memory_limit=2**20, tokenizer=Words(["a"])) as g:
        pytest.raises(RequestError, g.generate, ["a", " "], SIX).match(told)


@pytest.mark.parametrize("name", ["page_size", "memory_limit", "max_tokens", "budget"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True])
def test_a_generator_refuses_sizes_that_mean_nothing(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name}={value}"):
        Generator(transformer(build(TINY["gpt2"])), **{name: value})
