"""Attention of a decode step: Triton's kernel for it against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.ops import attend_pages, use
from hasten.ops.workspace import Workspace
from hasten.spec import Attention
from tests.ops.cases import convert

pytest.importorskip("triton", reason="Triton has no build for this platform")

from tests.ops.test_triton import (  # noqa: E402
    DTYPES,
    INTERPRETED,
    TOLERANCES,
    device,  # noqa: F401 - a fixture
    place,
)


def step(
    lengths: tuple[int, ...], heads: tuple[int, int, int], page: int = 16, room: int = 1, **more: Any
) -> tuple[Any, ...]:
    """float32 arguments of attend_pages for one new token each: pages in no order, `room` unused ones in each table,
    NaN wherever no sequence has written, slopes and sinks."""
    h, kv, dim = heads
    most = max(-(-n // page) for n in lengths) + room
    tables = 1 + torch.randperm(most * len(lengths)).view(len(lengths), most).int()  # page 0 is nobody's
    keys, values = torch.randn(2, most * len(lengths) + 1, page, kv, dim).unbind()
    written = torch.zeros(keys.shape[:2], dtype=torch.bool)
    for table, length in zip(tables.long(), lengths, strict=True):
        written.view(-1)[(table[:, None] * page + torch.arange(page)).flatten()[:length]] = True
        table[-(-length // page) :] = 2**30  # no page
    keys[~written] = values[~written] = float("nan")
    q = torch.randn(len(lengths), h + 2, dim)[:, 1:-1]
    a = Attention(h, kv, dim, dim**-0.5, True, "", **more)
    slopes, sinks = torch.linspace(0.01, 0.5, h), torch.randn(h)
    return q, keys, values, tables, None, torch.tensor(lengths).int(), a, slopes, sinks


def run(device: str, arguments: tuple[Any, ...]) -> Tensor:  # noqa: F811
    with use("triton"):
        return attend_pages(*place(arguments, device)).cpu()


def check(arguments: tuple[Any, ...], device: str, dtype: torch.dtype) -> None:  # noqa: F811
    """The answer is the reference's in float64."""
    want, bound = attend_pages.reference(*convert(arguments, torch.float64)), TOLERANCES[dtype]
    torch.testing.assert_close(run(device, arguments).double(), want, rtol=bound, atol=bound)


def changed(monkeypatch: pytest.MonkeyPatch, **shape: Any) -> None:
    """Launch the kernel in another shape than the one it would choose."""
    from hasten.ops.triton import attend_step as module

    launch = module.step_launch
    monkeypatch.setattr(module, "step_launch", lambda *a: replace(launch(*a), **shape))


RAGGED = (70, 0, 1, 129)


@DTYPES
@pytest.mark.parametrize("heads", [(4, 2, 80), (3, 1, 96), (2, 2, 64), (7, 1, 20), (1, 1, 10)], ids=str)
def test_every_group_and_head_width(heads: tuple[int, int, int], device: str, dtype: torch.dtype) -> None:  # noqa: F811
    check(convert(step(RAGGED, heads), dtype), device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(2, 1, 256), (71, 1, 64), (128, 1, 256), (1, 1, 256)], ids=str)
def test_the_widest_heads_and_groups(heads: tuple[int, int, int], device: str, dtype: torch.dtype) -> None:  # noqa: F811
    check(convert(step((40, 3), heads), dtype), device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(3, 1, 24), (1, 1, 24)], ids=str)
@pytest.mark.parametrize("more", [{"window": 37}, {"softcap": 2.0}, {"window": 20, "softcap": 5.0}], ids=str)
def test_window_and_soft_cap(more: Any, heads: tuple[int, int, int], device: str, dtype: torch.dtype) -> None:  # noqa: F811
    check(convert(step(RAGGED, heads, **more), dtype), device, dtype)


@pytest.mark.parametrize("heads", [(2, 1, 16), (1, 1, 16)], ids=str)
@pytest.mark.parametrize("window", [1, 2, 32, 33, 64, 65])
def test_windows_that_end_near_a_block(window: int, heads: tuple[int, int, int], device: str) -> None:  # noqa: F811
    check(step((1, 33, 65, 66, 97), heads, window=window), device, torch.float32)


@DTYPES
def test_without_slopes_or_sinks(device: str, dtype: torch.dtype) -> None:  # noqa: F811
    check((*convert(step(RAGGED, (3, 1, 24)), dtype)[:-2], None, None), device, dtype)


@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any),
    group=st.integers(1, 5),
    page=st.sampled_from((1, 7, 16, 64)),
    window=st.none() | st.integers(1, 160),
    room=st.sampled_from((0, 3, 40)),
)
def test_any_batch(lengths: list[int], group: int, page: int, window: int | None, room: int) -> None:
    if not INTERPRETED:
        pytest.skip("drawn shapes run in the interpreter")
    check(step(tuple(lengths), (group, 1, 16), page, room, window=window), "cpu", torch.float32)


def test_pools_of_another_dtype_and_wide_tables(device: str) -> None:  # noqa: F811
    for heads in ((2, 1, 16), (2, 2, 16)):
        q, keys, values, tables, _, lengths, *rest = step(RAGGED, heads)
        arguments = (q.half(), keys.bfloat16(), values.bfloat16(), tables.long(), None, lengths.long(), *rest)
        check(arguments, device, torch.float16)


@pytest.mark.parametrize("heads", [(4, 1, 24), (2, 2, 24)], ids=str)
def test_an_empty_place_gets_zeros_and_reads_nothing(heads: tuple[int, int, int], device: str) -> None:  # noqa: F811
    q, keys, values, tables, *rest = step((0, 0), heads)
    assert not run(device, (q, keys * float("nan"), values * float("nan"), tables, *rest)).count_nonzero()


@pytest.mark.parametrize("heads", [(4, 1, 24), (2, 2, 24)], ids=str)
def test_the_newest_token_is_seen(heads: tuple[int, int, int], device: str) -> None:  # noqa: F811
    q, keys, values, tables, starts, lengths, a, _, _ = step((1, 2, 33, 34), heads)
    arguments = (q, keys, values, tables, starts, lengths, a, None, None)
    want = run(device, arguments)
    for table, n in zip(tables.long(), lengths.tolist(), strict=True):
        values[table[(n - 1) // 16], (n - 1) % 16] += 1000
    got = run(device, arguments)
    assert (got - want).abs().amin() > 1e-3 * 1000  # the smallest share here is larger than a thousandth


def test_the_order_of_pages_changes_nothing(device: str) -> None:  # noqa: F811
    q, keys, values, tables, *rest = step((70, 129, 33), (2, 1, 16), room=0)
    order = torch.randperm(len(keys))
    moved = order.argsort()[tables.long().clamp(max=len(keys) - 1)].int()
    assert torch.equal(
        run(device, (q, keys[order], values[order], moved, *rest)), run(device, (q, keys, values, tables, *rest))
    )


@pytest.mark.parametrize(
    ("heads", "shapes"),
    [
        ((6, 1, 24), [{}, {"splits": 1}, {"splits": 3, "ahead": 2}, {"keys": 16, "ahead": 1}, {"least": 100}]),
        ((1, 1, 24), [{}, {"splits": 1}, {"splits": 3, "ahead": 2}, {"keys": 16, "ahead": 1}, {"rows": 16}]),
    ],
    ids=str,
)
def test_a_split_row_equals_the_row_that_one_program_computes(
    heads: tuple[int, int, int],
    shapes: list[dict[str, int]],
    device: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, answers = step((201, 64, 0), heads), []
    for shape in shapes:
        with monkeypatch.context() as patch:
            changed(patch, **shape)
            answers.append(run(device, arguments))
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=2e-6, atol=2e-6)


def test_counters_are_left_zero_for_the_next_call(device: str) -> None:  # noqa: F811
    first, second, workspace = step((150, 64, 1), (4, 1, 80)), step((129, 70, 0), (4, 1, 80)), Workspace()
    want = [run(device, arguments) for arguments in (first, second)]
    with workspace:
        got = [run(device, arguments) for arguments in (first, second, first)]
        assert not workspace.counters(1, place(first[0], device).device).count_nonzero()
    assert all(torch.equal(a, b) for a, b in zip(got, (*want, want[0]), strict=True))


def test_sequences_of_a_batch_do_not_change_each_other(device: str) -> None:  # noqa: F811
    q, keys, values, tables, starts, lengths, *rest = step((70, 129, 0, 33), (4, 1, 24))
    together = run(device, (q, keys, values, tables, starts, lengths, *rest))
    lengths[1] = 0
    apart = run(device, (q, keys, values, tables, starts, lengths, *rest))
    assert torch.equal(together[[0, 2, 3]], apart[[0, 2, 3]])


@given(
    sequences=st.integers(1, 1024),
    capacity=st.integers(1, 1 << 20),
    group=st.integers(1, 128),
    kv_heads=st.integers(1, 64),
    head_dim=st.integers(1, 256),
    size=st.sampled_from((2, 4)),
)
def test_every_launch_is_one_that_the_kernel_can_run(
    sequences: int, capacity: int, group: int, kv_heads: int, head_dim: int, size: int
) -> None:
    from hasten.ops.triton.attend_step import step_launch

    a = Attention(group * kv_heads, kv_heads, head_dim, 1.0, True, "")
    shape = step_launch(sequences, capacity, a, size, 132)
    sizes = (shape.rows, shape.keys, shape.dim, shape.heads, shape.ahead, shape.warps)
    assert all(n > 0 and n & (n - 1) == 0 for n in sizes)
    assert shape.rows >= group
    assert shape.dim >= head_dim
    assert 1 <= shape.splits <= 64
    assert shape.least % shape.keys == 0
