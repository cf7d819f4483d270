"""The two ends of a decode step, interpreted on the CPU and compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.ops import EmbedLayer, Workspace, advance, embed, use
from hasten.spec import Tokens
from tests.ops.cases import CASES
from tests.ops.test_triton import DTYPES, check, device, place

__all__ = ["device"]  # the fixture: interpreted or compiled


@DTYPES
@pytest.mark.parametrize("case", CASES["embed"])
def test_embedding_is_that_of_the_reference_in_float64(case: str, device: str, dtype: torch.dtype) -> None:
    check("embed", CASES["embed"][case](dtype), device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES["embed"])
def test_embedding_rounds_where_the_reference_rounds(case: str, device: str, dtype: torch.dtype) -> None:
    arguments = CASES["embed"][case](dtype)
    with use("triton"):
        got = embed(*place(arguments, device)).cpu()
    want = embed.reference(*arguments)
    if (
        device == "cuda" and dtype == torch.float32
    ):  # the compiler fuses a product and the sum behind it: one rounding less
        torch.testing.assert_close(got, want, rtol=2e-7, atol=2e-7)
    else:
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES["embed"])
def test_bfloat16_embedding_rounds_where_the_reference_rounds(case: str) -> None:
    arguments = place(CASES["embed"][case](torch.bfloat16), "cuda")
    with use("triton"):
        assert torch.equal(embed(*arguments), embed.reference(*arguments))


@pytest.mark.parametrize(
    ("ids", "positions", "types", "unknown"),
    [
        ([3, -1, 41, 40], [0, 0, 0, 0], [0, 0, 0, 0], [False, True, True, False]),
        ([3, 3, 3, 3], [4, 5, -1, -3], [0, 0, 0, 0], [False, True, False, True]),
        ([3, 3, 3, 3], [0, 0, 0, 0], [1, 2, 0, -1], [False, True, False, True]),
    ],
    ids=["token", "position", "type"],
)
def test_what_no_table_has_is_not_a_number(
    ids: list[int], positions: list[int], types: list[int], unknown: list[bool], device: str
) -> None:
    e = EmbedLayer(Tokens(41, 8, 6, position_offset=1, types=2), *(torch.randn(n, 8) for n in (41, 6, 2)))
    with use("triton"):
        x = embed(*place((*map(torch.tensor, (ids, positions, types)), e), device))
    assert x.isnan().all(-1).tolist() == x.isnan().any(-1).tolist() == unknown


@pytest.mark.gpu
def test_the_reference_too_leaves_the_gpu_alive() -> None:
    table, ids = torch.randn(41, 8, device="cuda").half(), torch.tensor([[3, -1], [41, 40]], device="cuda")
    with use("reference"):
        x = embed(ids, None, None, EmbedLayer(Tokens(41, 8), table))
    assert x.isnan().all(-1).tolist() == x.isnan().any(-1).tolist() == [[False, True], [True, False]]
    assert torch.equal(x[ids.eq(3)], table[[3]])


def test_embedding_leaves_types_of_another_dtype_to_the_reference() -> None:
    e = EmbedLayer(Tokens(5, 8, types=2), torch.zeros(5, 8).half(), None, torch.zeros(2, 8))
    with use("triton"), pytest.raises(ConfigError, match="embed has no triton implementation"):
        embed(torch.zeros(1).long(), None, None, e)


# ---- advance


def by_hand(arguments: tuple[Any, ...]) -> list[Any]:
    """Every argument after the call, row by row in Python."""
    tokens, ids, positions, lengths, slots, tables, page, said, count = (
        a.tolist() if isinstance(a, Tensor) else a for a in arguments
    )
    for r, token in enumerate(tokens):
        said[count[0]][r] = token if lengths[r] else -1
        if lengths[r]:
            ids[r], positions[r], lengths[r] = max(token, 0), positions[r] + 1, lengths[r] + 1
            column, offset = divmod(positions[r], page)
            held = tables[r][column] if column < len(tables[r]) else -1
            slots[r] = held * page + offset if held >= 0 else -1
    return [tokens, ids, positions, lengths, slots, tables, page, said, [count[0] + 1]]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES["advance"])
def test_every_row_moves_on_by_one(case: str, backend: str, device: str) -> None:
    arguments = place(CASES["advance"][case](torch.float32), device)
    want = by_hand(arguments)
    with use(backend), Workspace() as workspace:
        advance(*arguments)
        assert not workspace.counters(1, arguments[0].device).any()
    assert [a.tolist() if isinstance(a, Tensor) else a for a in arguments] == want


@pytest.mark.parametrize("rows", [3, 2500])
def test_steps_follow_each_other(rows: int, device: str) -> None:
    case = "several rows" if rows == 3 else "more rows than a program has"
    arguments = place(CASES["advance"][case](torch.float32), device)
    said, count = arguments[-2:]
    count.zero_()
    first, chosen = arguments[0], []
    with use("triton"), Workspace():
        for i in range(3):
            chosen.append(first + i)  # as in a decode step, another kernel runs between one advance and the next
            advance(chosen[-1], *arguments[1:])
    live = arguments[3] > 0
    assert count.item() == 3
    assert torch.equal(said[:, live], torch.stack(chosen)[:, live])
    assert torch.equal(arguments[1][live], chosen[-1][live])


def test_said_may_be_columns_of_a_larger_table(device: str) -> None:
    *arguments, said, count = CASES["advance"]["several rows"](torch.float32)
    wide = torch.full((3, 20), -7)[:, :13]
    check("advance", (*arguments, wide, count), device, torch.float32)


# ---- captured


@pytest.mark.gpu
def test_both_ends_are_captured_in_a_graph() -> None:
    e = EmbedLayer(Tokens(1000, 256), torch.randn(1000, 256, device="cuda"))
    arguments = place(CASES["advance"]["padding"](torch.float32), "cuda")
    arguments[-1].zero_()

    def step() -> Tensor:
        x = embed(arguments[1], None, None, e)
        advance(*arguments)
        return x

    with use("triton"), Workspace():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x = step()
        graph.replay()
    assert torch.equal(x, e.tokens[arguments[1]])
    assert arguments[-1].item() == 2
