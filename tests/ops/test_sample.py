"""Every filter drops what transformers' drops, and a row's answer depends on no other row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hasten.ops import Choice, sample

VOCAB = 61
POINTS = 97


def column(value: float, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((rows,), value, dtype=dtype)


def drawn(scores: Tensor, points: Tensor) -> Tensor:
    """By the inverse of the cumulative distribution, one id for each point."""
    mass = scores.double().softmax(-1).cumsum(-1)
    return (mass[None] <= points[:, None]).sum(-1)


def everywhere(logits: Tensor, c: Choice, points: Tensor) -> Tensor:
    """The ids that one row of logits gives at each point."""
    return sample(logits.expand(len(points), -1), c, points, None, None)


@given(
    st.floats(0.05, 3.0),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    st.sampled_from([0, 1, 2, 7, 60, 61, 500]),
    st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    st.integers(0, 10**6),
)
def test_the_filters_leave_what_transformers_leaves(
    t: float, min_p: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    theirs = LogitsProcessorList([TemperatureLogitsWarper(t)])
    if min_p:
        theirs.append(MinPLogitsWarper(min_p))
    if top_k:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    points = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    c = Choice(
        column(t, POINTS),
        column(min_p, POINTS),
        column(top_k, POINTS, torch.int64),
        column(top_p, POINTS, torch.float64),
    )
    want = drawn(theirs(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0], points)
    assert torch.equal(everywhere(logits, c, points), want)


@given(st.floats(0.1, 5.0), st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 9))
def test_the_repetition_penalty_is_transformers_over_prompt_and_completion(
    penalty: float, seed: int, prompt: int, new: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, VOCAB, generator=g)
    tokens = torch.randint(VOCAB, (1, prompt + new), generator=g)
    want = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone()).argmax(-1)
    c = Choice(repetition=column(penalty, 1))
    assert torch.equal(sample(logits, c, None, tokens[:, :prompt], tokens[:, prompt:]), want)


def test_presence_is_subtracted_once_and_frequency_each_time_from_generated_tokens_only() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 5], logits[:, 6], logits[:, 7] = 3.0, 2.5, 1.0
    prompts = torch.tensor([[5, 5, 5, 5]] * 3)
    generated = torch.tensor([[5, 5, 6, -1]] * 3)
    # 5: 3 - presence - 2 frequency; 6: 2.5 - presence - frequency; 7: 1
    c = Choice(presence=torch.tensor([0.0, 2.5, 0.0]), frequency=torch.tensor([0.0, 0.0, 0.75]))
    assert sample(logits, c, None, prompts, generated).tolist() == [5, 7, 6]
    unseen = torch.full((3, 1), -1)
    assert sample(logits, c, None, prompts, unseen).tolist() == [5, 5, 5]


def test_penalties_come_in_order_repetition_then_frequency_then_presence() -> None:
    logits = torch.tensor([[8.0, 2.5]])
    tokens = torch.tensor([[0, 0]])
    c = Choice(repetition=column(2.0, 1), frequency=column(0.5, 1), presence=column(0.4, 1))
    assert sample(logits, c, None, tokens, tokens).item() == 0  # 8 / 2 - 2 * 0.5 - 0.4 = 2.6
    c = Choice(repetition=column(2.0, 1), frequency=column(0.5, 1), presence=column(0.6, 1))
    assert sample(logits, c, None, tokens, tokens).item() == 1


def settings(rows: int) -> Choice:
    """Rows that differ in everything, some of them greedy, some without one filter or another."""
    g = torch.Generator().manual_seed(3)

    def some(low: float, high: float, off: float) -> Tensor:
        values = low + (high - low) * torch.rand(rows, generator=g)
        return torch.where(torch.rand(rows, generator=g) < 0.4, off, values)

    return Choice(
        some(0.2, 2.0, 0.0),
        some(0.0, 0.3, 0.0),
        some(1, 50, 0).long(),
        some(0.1, 1.0, 1.0).double(),
        some(0.5, 2.0, 1.0),
        some(-1.0, 1.0, 0.0),
        some(-1.0, 1.0, 0.0),
    )


@pytest.mark.parametrize("vocab", [1, 2, 61, 3001])
def test_a_row_alone_chooses_what_it_chooses_among_others(vocab: int) -> None:
    rows, g = 23, torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(rows, vocab, generator=g)
    c, u = settings(rows), torch.rand(rows, dtype=torch.float64, generator=g)
    prompts, generated = (torch.randint(-1, vocab, (rows, n), generator=g) for n in (4, 7))
    together = sample(logits, c, u, prompts, generated)
    fields = [f for f in Choice.__dataclass_fields__]
    for r in range(rows):
        only = slice(r, r + 1)
        alone = Choice(**{f: getattr(c, f)[only] for f in fields})
        assert sample(logits[only], alone, u[only], prompts[only], generated[only]) == together[r]
        off = {"temperature": 0, "min_p": 0, "top_k": 0, "top_p": 1, "repetition": 1, "presence": 0, "frequency": 0}
        absent = Choice(**{f: None if getattr(alone, f) == off[f] else getattr(alone, f) for f in fields})
        assert sample(logits[only], absent, u[only], prompts[only], generated[only]) == together[r]


def test_temperature_zero_takes_the_likeliest_beside_rows_that_draw() -> None:
    logits = torch.randn(40, VOCAB)
    c = Choice(torch.tensor([0.0, 5.0]).repeat(20))
    ids = sample(logits, c, torch.rand(40, dtype=torch.float64), None, None)
    assert torch.equal(ids[::2], logits.argmax(-1)[::2])
    assert not torch.equal(ids[1::2], logits.argmax(-1)[1::2])


def test_draws_follow_the_distribution() -> None:
    logits, n = torch.randn(9), 20000
    u = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = sample(logits.expand(n, -1), Choice(column(0.8, n)), u, None, None)
    share = torch.bincount(ids, minlength=9) / n
    torch.testing.assert_close(share, (logits / 0.8).softmax(-1), atol=4 * 0.5 / math.sqrt(n), rtol=0)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-52, 1 - 2**-53])
def test_forbidden_tokens_are_never_drawn_at_the_ends_of_the_interval(u: float) -> None:
    logits = torch.full((1, 9), -math.inf)
    logits[0, 3], logits[0, 5] = 0.1, 0.3
    got = sample(logits, Choice(column(1.0, 1)), torch.tensor([u], dtype=torch.float64), None, None)
    assert got.item() == (3 if u == 0 else 5)


@pytest.mark.parametrize("field", ["top_k", "top_p"])
def test_of_equals_at_a_border_all_stay(field: str) -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0]).expand(300, -1)
    dtype = torch.int64 if field == "top_k" else torch.float64
    c = Choice(column(1.0, 300), **{field: column(2 if field == "top_k" else 0.6, 300, dtype)})
    ids = sample(logits, c, torch.linspace(0, 0.999, 300, dtype=torch.float64), None, None)
    assert set(ids.tolist()) == {0, 1, 2}


def test_top_p_looks_beyond_its_first_guess_in_flat_distributions() -> None:
    logits = torch.linspace(0, 1e-3, 5000).expand(2, -1)
    c = Choice(column(1.0, 2), top_p=torch.tensor([0.99, 0.5], dtype=torch.float64))
    u = torch.zeros(2, dtype=torch.float64)
    want = [TopPLogitsWarper(p)(torch.zeros(1, 1), logits[:1]).isfinite().int().argmax().item() for p in (0.99, 0.5)]
    got = sample(logits, c, u, None, None).tolist()
    assert all(abs(a - b) <= 2 for a, b in zip(got, want, strict=True))  # theirs sums 5,000 shares in float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_is_chosen_from_in_float32_or_wider(dtype: torch.dtype) -> None:
    logits = torch.randn(5, VOCAB).to(dtype)
    c, u = Choice(column(0.3, 5)), torch.rand(5, dtype=torch.float64)
    assert torch.equal(sample(logits, c, u, None, None), sample(logits.double(), c, u, None, None))


def test_no_rows_give_no_ids() -> None:
    c = Choice(torch.ones(0), top_p=torch.ones(0, dtype=torch.float64))
    assert sample(torch.empty(0, VOCAB), c, torch.ones(0, dtype=torch.float64), None, None).shape == (0,)
