"""Mixtures of experts, interpreted on the CPU and compiled on a GPU, for few tokens and for many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.errors import ConfigError
from hasten.ops import Matrix, Workspace, experts, route, use
from hasten.ops.triton import experts as module
from hasten.ops.triton.expert_groups import group_launch, group_pairs, most_tiles
from hasten.spec import Mlp, Moe
from tests.ops.arguments import matrix, random
from tests.ops.cases import CASES
from tests.ops.test_triton import DTYPES, INTERPRETED, TOLERANCES, check, device, place

__all__ = ["device"]  # the fixture: interpreted or compiled

FEW, MANY = 0, 1  # places in the table: products of one row, and of groups


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of one processor wants few programs, of several rows, which the interpreter runs in seconds."""
    if INTERPRETED:
        monkeypatch.setattr(module, "processors", lambda _: 1)


def mixture(experts: int, top_k: int, width: int = 6, act: str = "silu", gated: bool = True, **more: Any) -> Moe:
    return Moe(experts, top_k, Mlp(width, act, gated, True), more.pop("renormalize", True), **more)


def arguments(
    m: Moe, tokens: int, width: int, d: torch.dtype, bias: bool = True, chosen: int | None = None
) -> tuple[Any, ...]:
    """Arguments of `experts`; only the first `chosen` experts are."""
    which = torch.rand(tokens, chosen or m.experts).argsort(-1)[:, : m.top_k]
    up = matrix(d, m.experts, (1 + m.expert.gated) * m.expert.width, width, bias=bias)
    down = matrix(d, m.experts, width, m.expert.width, bias=bias)
    return random(tokens, width, dtype=d), torch.rand(tokens, m.top_k).softmax(-1), which, up, down, m


def run(place_in_table: int, device: str, dtype: torch.dtype, given: tuple[Any, ...]) -> None:  # noqa: F811
    """One implementation against the reference in float64."""
    made = [i for i in experts.implementations if i.backend == "triton"][place_in_table]
    x, shares, which, up, down, m = given
    wide = [Matrix(w.weight.double(), None if w.bias is None else w.bias.double()) for w in (up, down)]
    want = experts.reference(x.double(), shares.double(), which, *wide, m)
    got = made.run(*place(given, device))
    bound = TOLERANCES[dtype]
    torch.testing.assert_close(got.cpu().double(), want, rtol=bound, atol=bound)


# ---- route


@DTYPES
@pytest.mark.parametrize("case", CASES["route"])
def test_routes_are_those_of_the_reference(case: str, device: str, dtype: torch.dtype) -> None:
    check("route", CASES["route"][case](dtype), device, dtype)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("experts", "top_k", "width"), [(3, 1, 130), (40, 8, 520), (5, 5, 2100)])
def test_routes_through_routers_of_any_size(experts: int, top_k: int, width: int, score: Any, device: str) -> None:
    m = mixture(experts, top_k, score=score, renormalize=top_k > 1)
    router = Matrix(torch.randn(experts, width + 3)[:, :width] / width**0.5, torch.randn(experts))
    check("route", (torch.randn(3, 2 * width)[:, ::2], router, m), device, torch.float32)


def test_routing_leaves_its_counters_at_zero(device: str) -> None:
    x, router, m = place((torch.randn(3, 2100), Matrix(torch.randn(40, 2100)), mixture(40, 2)), device)
    with use("triton"), Workspace() as workspace:
        first, second = route(x, router, m), route(x, router, m)
        assert not workspace.counters(1, x.device).any()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_token_that_is_not_a_number_takes_experts_that_exist_with_shares_that_are_none(device: str) -> None:
    x = torch.randn(2, 8)
    x[1, 3] = float("nan")
    with use("triton"):
        shares, which = route(*place((x, Matrix(torch.randn(5, 8)), mixture(5, 2)), device))
    assert shares.isnan().all(-1).tolist() == [False, True]
    assert ((which >= 0) & (which < 5)).all()


def test_many_tokens_are_routed_by_the_reference() -> None:
    with use("triton"), pytest.raises(ConfigError, match="route has no triton implementation"):
        route(torch.zeros(65, 8), Matrix(torch.zeros(4, 8)), mixture(4, 2))


# ---- experts


@DTYPES
@pytest.mark.parametrize("number", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("case", CASES["experts"])
def test_experts_are_those_of_the_reference(case: str, number: int, device: str, dtype: torch.dtype) -> None:
    run(number, device, dtype, CASES["experts"][case](dtype))


@pytest.mark.parametrize("number", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(("act", "gated"), [("relu2", False), ("tanh", True)])
def test_other_activations(act: str, gated: bool, number: int, device: str) -> None:
    run(number, device, torch.float32, arguments(mixture(3, 2, 5, act, gated), 4, 9, torch.float32))


@DTYPES
@pytest.mark.parametrize("number", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(("width", "inner"), [(40, 70), (130, 33)])
def test_experts_of_any_width(width: int, inner: int, number: int, device: str, dtype: torch.dtype) -> None:
    run(number, device, dtype, arguments(mixture(3, 2, inner), 2, width, dtype))


def test_a_large_device_takes_one_row_a_program(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processors", lambda _: 132)
    run(FEW, device, torch.float16, arguments(mixture(3, 2, 5), 2, 9, torch.float16))


def test_rows_are_summed_over_several_blocks(device: str) -> None:
    run(FEW, device, torch.float16, arguments(mixture(2, 1, 40), 1, 4200, torch.float16))


@DTYPES
@pytest.mark.parametrize("chosen", [2, 5])
def test_groups_of_several_tiles(chosen: int, device: str, dtype: torch.dtype) -> None:
    run(MANY, device, dtype, arguments(mixture(5, 2, 20), 41, 24, dtype, chosen=chosen))


@settings(max_examples=4)
@given(count=st.integers(1, 6), tokens=st.integers(1, 25), top_k=st.integers(1, 3), seed=st.integers(0, 99))
def test_groups_of_any_sizes(count: int, tokens: int, top_k: int, seed: int) -> None:
    if not INTERPRETED:
        pytest.skip("drawn shapes run in the interpreter")
    torch.manual_seed(seed)
    m = mixture(count, min(top_k, count), 8)
    run(MANY, "cpu", torch.float32, arguments(m, tokens, 9, torch.float32, chosen=max(m.top_k, count // 2)))


@pytest.mark.parametrize("pairs", [1, 130, 300])
def test_pairs_are_grouped_by_expert_in_order(pairs: int, device: str) -> None:
    which = torch.randint(5, (pairs,)).to(device)
    order, ends = (torch.full((n,), -1, dtype=torch.int32, device=device) for n in (pairs, 6))
    group_pairs[(6,)](which, order, ends, pairs, TWO=pairs % 2 == 0, PDL=False, BLOCK=128)
    assert torch.equal(order.long(), which.argsort(stable=True))
    assert torch.equal(ends.long(), which.bincount(minlength=6).cumsum(0))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40).filter(any))
def test_there_are_enough_tiles_however_pairs_are_shared_out(sizes: list[int]) -> None:
    tile = group_launch(sum(sizes), len(sizes), 2, True).tile
    assert sum(-(-n // tile) for n in sizes) <= most_tiles(sum(sizes), len(sizes), tile)


def test_matrices_may_be_cut_out_of_larger_ones(device: str) -> None:
    x, shares, which, up, down, m = arguments(mixture(4, 2, 10), 3, 12, torch.float32)
    wide = torch.randn(4, 23, 17)
    cut = replace(up, weight=wide[:, :20, :12]), replace(down, weight=torch.randn(5, 12, 20)[1:, :, ::2])
    for number in (FEW, MANY):
        run(number, device, torch.float32, (torch.randn(3, 24)[:, ::2], shares, which, *cut, m))
    assert x.shape == (3, 12)


def test_few_tokens_read_only_what_they_chose(device: str) -> None:
    x, shares, which, up, down, m = arguments(mixture(8, 2, 10), 3, 12, torch.float32, chosen=3)
    want = experts.reference(x, shares, which, up, down, m)
    for tensor in (up.weight, up.bias, down.weight, down.bias):
        assert isinstance(tensor, Tensor)
        tensor[3:] = float("nan")
    for number in (FEW, MANY):
        made = [i for i in experts.implementations if i.backend == "triton"][number]
        got = made.run(*place((x, shares, which, up, down, m), device))
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


def test_pairs_decide_between_rows_and_groups() -> None:
    rows, groups = [i for i in experts.implementations if i.backend == "triton"]
    m = mixture(8, 2)
    for tokens, chosen in ((8, rows), (9, groups)):
        with use("triton"):
            assert experts.choose(*arguments(m, tokens, 9, torch.float32)) is chosen.run


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_mixture_is_captured_in_a_graph(tokens: int) -> None:
    m = mixture(8, 2, 128)
    given = place(arguments(m, tokens, 256, torch.bfloat16), "cuda")
    router, x = Matrix(torch.randn(8, 256, device="cuda").bfloat16()), given[0]

    def step() -> Tensor:
        return experts(x, *route(x, router, m), *given[3:])

    with Workspace():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        x.copy_(torch.randn(tokens, 256, device="cuda"))
        graph.replay()
        assert torch.equal(got, step())
