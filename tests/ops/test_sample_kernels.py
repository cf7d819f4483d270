"""Sampling on the device: the ids of the reference, for the same logits and the same random numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.errors import ConfigError
from hasten.ops import Choice, sample, use
from hasten.ops.triton.sample import sample_launch
from tests.ops.cases import CASES
from tests.ops.test_triton import DTYPES, INTERPRETED, device, place

__all__ = ["device"]  # the fixture: interpreted or compiled


def ids(device: str, *arguments: Any) -> Tensor:  # noqa: F811
    with use("triton"):
        return sample(*place(arguments, device)).cpu()


def check(device: str, *arguments: Any) -> None:  # noqa: F811
    assert torch.equal(ids(device, *arguments), sample.reference(*arguments))


def logits(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    """A third of them forbidden."""
    x = scale * torch.randn(rows, vocabulary)
    x[:, 1:] = torch.where(torch.rand(rows, vocabulary - 1) < 0.33, -math.inf, x[:, 1:])
    return x.to(dtype)


def some(rows: int, low: float, high: float, off: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values between low and high, and some that switch off."""
    values = low + (high - low) * torch.rand(rows, dtype=torch.float64)
    return torch.where(torch.rand(rows) < 0.3, off, values).to(dtype)


SHAPES = pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (3, 129), (2, 3001), (17, 4099), (5, 1)])


@DTYPES
@pytest.mark.parametrize("case", CASES["sample"])
def test_ids_are_those_of_the_reference(case: str, device: str, dtype: torch.dtype) -> None:
    check(device, *CASES["sample"][case](dtype))


@DTYPES
@SHAPES
def test_the_likeliest(rows: int, vocabulary: int, device: str, dtype: torch.dtype) -> None:
    check(device, logits(rows, vocabulary, dtype), Choice(), None, None, None)


@DTYPES
@SHAPES
def test_draws_beside_rows_that_take_the_likeliest(rows: int, vocabulary: int, device: str, dtype: torch.dtype) -> None:
    uniform = torch.rand(rows, dtype=torch.float64)
    check(device, logits(rows, vocabulary, dtype), Choice(some(rows, 0.2, 2.0, 0.0)), uniform, None, None)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "filters", "dtype"),
    [
        (3, 129, "k", torch.float32),
        (3, 129, "p", torch.bfloat16),
        (3, 700, "m", torch.float32),
        (5, 700, "kp", torch.float16),
        (5, 129, "kp", torch.float32),
        (2, 3001, "kpm", torch.bfloat16),
        (17, 9, "kpm", torch.float16),
        (2, 1, "kpm", torch.float32),
    ],
)
def test_filters(rows: int, vocabulary: int, filters: str, dtype: torch.dtype, device: str) -> None:
    c = Choice(
        some(rows, 0.2, 2.0, 0.0),
        some(rows, 0.0, 0.3, 0.0) if "m" in filters else None,
        some(rows, 1, 50, 0, torch.int64) if "k" in filters else None,
        some(rows, 0.1, 1.0, 1.0, torch.float64) if "p" in filters else None,
    )
    for _ in range(3):
        check(device, logits(rows, vocabulary, dtype), c, torch.rand(rows, dtype=torch.float64), None, None)


@DTYPES
@pytest.mark.parametrize("filters", [{"top_k": torch.ones(2).long()}, {"top_p": torch.full((2,), 0.1).double()}])
def test_filters_tell_neighbouring_numbers_apart(filters: Any, device: str, dtype: torch.dtype) -> None:
    """Of two logits a rounding apart only the greater stays, here the second, whatever is drawn."""
    eps = torch.finfo(dtype).eps
    x = torch.tensor([[1.0, 1.0 + eps], [-1.0 - eps, -1.0]]).to(dtype)
    assert ids(device, x, Choice(torch.ones(2), **filters), torch.zeros(2).double(), None, None).tolist() == [1, 1]


@pytest.mark.parametrize("drawn", [False, True])
def test_penalties(drawn: bool, device: str) -> None:
    rows = 5
    c = Choice(
        some(rows, 0.2, 2.0, 0.0) if drawn else None,
        top_k=some(rows, 1, 50, 0, torch.int64),
        repetition=some(rows, 0.5, 2.0, 1.0),
        presence=some(rows, -1, 1, 0.0),
        frequency=some(rows, -1, 1, 0.0),
    )
    prompts, generated = (torch.randint(-1, 131, (rows, n)) for n in (4, 70))
    check(device, logits(rows, 131), c, torch.rand(rows, dtype=torch.float64), prompts, generated)


@settings(max_examples=8)
@given(vocabulary=st.integers(1, 300), seed=st.integers(0, 10**6), scale=st.sampled_from((0.01, 1.0, 30.0)))
def test_draws_everywhere(vocabulary: int, seed: int, scale: float) -> None:
    if not INTERPRETED:
        pytest.skip("drawn shapes run in the interpreter")
    torch.manual_seed(seed)
    uniform = torch.cat((torch.rand(10, dtype=torch.float64), torch.tensor([0, 1 - 2**-53], dtype=torch.float64)))
    x = logits(1, vocabulary, scale=scale).expand(12, -1).contiguous()
    check("cpu", x, Choice(torch.full((12,), 0.7)), uniform, None, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocabulary", [50257, 128256, 262144])
def test_ten_thousand_draws_from_whole_vocabularies(vocabulary: int, dtype: torch.dtype) -> None:
    for _ in range(100):
        x = (3 * torch.randn(100, vocabulary, device="cuda")).to(dtype)
        uniform = torch.rand(100, dtype=torch.float64, device="cuda")
        c = Choice(torch.linspace(0.3, 1.5, 100, device="cuda"))
        assert torch.equal(sample(x, c, uniform, None, None), sample.reference(x, c, uniform, None, None))


# ---- borders


@pytest.mark.parametrize("vocabulary", [9, 2100])
@pytest.mark.parametrize("u", [0.0, 1 - 2**-52, 1 - 2**-53])
def test_forbidden_tokens_are_never_drawn_at_the_ends_of_the_interval(u: float, vocabulary: int, device: str) -> None:
    x = torch.full((1, vocabulary), -math.inf)
    x[0, 3], x[0, 5] = 0.1, 0.3
    got = ids(device, x, Choice(torch.ones(1)), torch.tensor([u], dtype=torch.float64), None, None)
    assert got.item() == (3 if u == 0 else 5)


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 0.75, 0.9999])
def test_a_number_on_a_border_draws_the_id_behind_it(u: float, device: str) -> None:
    x = torch.full((1, 4096), -math.inf)
    x[0, [0, 1024, 2047, 4095]] = 0.0
    got = ids(device, x, Choice(torch.ones(1)), torch.tensor([u], dtype=torch.float64), None, None)
    assert got.item() == [0, 1024, 2047, 4095][int(4 * u)]


@pytest.mark.parametrize("at", [(0, 1), (1023, 1024), (2000, 3000)])
def test_of_equals_the_first_is_taken(at: tuple[int, ...], device: str) -> None:
    x = torch.randn(2, 3001)
    x[:, list(at)] = 9.0
    assert ids(device, x, Choice(), None, None, None).tolist() == [at[0]] * 2


WARM = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
FILTERED = Choice(WARM, torch.full((5,), 0.1), torch.full((5,), 9), torch.full((5,), 0.9, dtype=torch.float64))


@pytest.mark.parametrize("c", [Choice(), Choice(WARM), FILTERED], ids=["greedy", "drawn", "filtered"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_without_a_finite_greatest_logit_have_no_token(c: Choice, backend: str, device: str) -> None:
    x = torch.randn(5, 2100)
    x[0, 2099], x[1, 3], x[2], x[3, 1500] = math.nan, math.nan, -math.inf, math.inf
    uniform = torch.rand(5, dtype=torch.float64)
    with use(backend):
        got = sample(*place((x, c, uniform), device), None, None).tolist()
    assert got == [-1, -1, -1, -1, x[4].argmax().item()]


@pytest.mark.parametrize("temperature", [None, torch.tensor([0.0, 0.9, 2.0])])
def test_rows_may_lie_apart(temperature: Tensor | None, device: str) -> None:
    x, uniform = logits(3, 400)[:, 50:350], torch.rand(3, dtype=torch.float64)
    check(device, x, Choice(temperature), uniform, None, None)
    check(device, logits(3, 400)[:, ::2], Choice(temperature), uniform, None, None)


def test_no_rows_give_no_ids(device: str) -> None:
    c = Choice(torch.ones(0), top_p=torch.ones(0, dtype=torch.float64))
    assert ids(device, torch.empty(0, 61), c, torch.ones(0, dtype=torch.float64), None, None).shape == (0,)


def test_float64_logits_go_to_the_reference() -> None:
    with use("triton"), pytest.raises(ConfigError, match="sample has no triton implementation"):
        sample(torch.zeros(1, 3, dtype=torch.float64), Choice(), None, None, None)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (1, 128256), (128, 128256), (1, 262144), (512, 50257)])
def test_a_row_is_split_into_blocks_that_one_program_can_look_through(rows: int, vocabulary: int) -> None:
    shape = sample_launch(rows, vocabulary)
    assert (shape.blocks - 1) * shape.block < vocabulary <= shape.blocks * shape.block
    assert shape.blocks <= 256


@pytest.mark.gpu
@pytest.mark.parametrize("filtered", [False, True])
def test_draws_are_captured_in_a_graph(filtered: bool) -> None:
    x, uniform = torch.randn(8, 50257, device="cuda").half(), torch.rand(8, dtype=torch.float64, device="cuda")
    c = Choice(torch.full((8,), 0.8, device="cuda"))
    if filtered:
        top_p = torch.full((8,), 0.9, device="cuda", dtype=torch.float64)
        c = Choice(c.temperature, top_k=torch.full((8,), 40, device="cuda"), top_p=top_p)
    sample(x, c, uniform, None, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sample(x, c, uniform, None, None)
    x.copy_(torch.randn(8, 50257, device="cuda"))
    uniform.copy_(torch.rand(8, device="cuda"))
    graph.replay()
    assert torch.equal(got, sample.reference(x, c, uniform, None, None))
