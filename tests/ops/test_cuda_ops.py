"""What CUDA tensors are served with: torch's own kernels, and Triton's attention over keys side by side.

Torch's kernels are called through the same functions on the CPU, where torch computes with others of its own.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import hasten.ops.cuda  # noqa: F401 - registers
from hasten.ops import TABLE, attend, attend_packed, linear, up
from hasten.spec import Attention
from tests.ops.arguments import attention, matrix, random
from tests.ops.cases import CASES, convert, tensors
from tests.ops.test_cpu import TOLERANCES as LOOSE

pytest.importorskip("triton", reason="Triton has no build for this platform")

from tests.ops.test_triton import DTYPES, INTERPRETED, check, device, place  # noqa: E402, F401 - a fixture

ON_CUDA = [
    (op, i)
    for op in (linear, up, attend)
    for i in op.implementations
    if i.devices == frozenset(("cuda",)) and i.backend != "triton"
]
NAMES = [f"{op.name}-{i.backend}" for op, i in ON_CUDA]


@DTYPES
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("op", "faster"), ON_CUDA, ids=NAMES)
def test_torchs_kernels_give_the_answer_of_the_reference_in_float64(
    op: Any, faster: Any, where: str, dtype: torch.dtype
) -> None:
    served = 0
    for case, make in CASES[op.name].items():
        torch.manual_seed(0)
        arguments = make(dtype)
        if not faster.accepts(*arguments):
            continue
        served += 1
        want = tensors(op.reference(*convert(arguments, torch.float64)))
        got = tensors(faster.run(*_onto(arguments, where)))
        for g, w in zip(got, want, strict=True):
            bound = LOOSE[dtype]
            torch.testing.assert_close(
                g.cpu().double(), w.double(), rtol=bound, atol=bound, msg=lambda m, c=case: f"{c}: {m}"
            )
    reached = faster.backend in ("cublas", "efficient") and not (op is up and dtype == torch.float32)
    assert served or not reached, "no case reaches it"


def _onto(value: Any, where: str) -> Any:
    if hasattr(value, "weight"):
        return type(value)(*(_onto(getattr(value, f), where) for f in value.__dataclass_fields__))
    return place(value, where)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("queries", [16, 600])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_flash_and_cudnn_share_the_unmasked_queries_by_their_number(
    queries: int, heads: tuple[int, int], where: str
) -> None:
    a = Attention(*heads, 16, 0.25, False, "")
    many = torch.empty(128, 256, heads[0], 16, dtype=torch.float16)
    assert [i.backend for op, i in ON_CUDA if op is attend and i.accepts(many, many, many, a, None, None, None)][
        0
    ] == "cudnn"
    q, k, v = (random(2, queries, h, 16, dtype=torch.float16) for h in (heads[0], heads[1], heads[1]))
    arguments = (q, k, v, a, None, None, None)
    takers = [i.backend for op, i in ON_CUDA if op is attend and i.accepts(*arguments)]
    assert takers == (["cudnn", "flash", "efficient"] if queries == 600 else ["flash", "efficient"])
    want = attend.reference(*convert(arguments, torch.float64))
    for op, i in ON_CUDA:
        if op is attend and i.accepts(*arguments):
            got = i.run(*_onto(arguments, where)).cpu().double()
            torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"a": attention(4, 2, 8, softcap=2.0)},
        {"sinks": torch.zeros(4)},
        {"bias": torch.zeros(1, 4, 3, 5)},
        {"q": torch.zeros(1, 0, 4, 8).half()},
        {"k": torch.zeros(1, 0, 2, 8).half(), "v": torch.zeros(1, 0, 2, 8).half()},
    ],
    ids=lambda c: next(iter(c)),
)
def test_torchs_attention_declines_what_it_would_get_wrong(change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 3, 4, 8).half(),
        **{n: torch.zeros(1, 5, 2, 8).half() for n in "kv"},
        "a": attention(4, 2, 8),
        **dict.fromkeys(("mask", "bias", "sinks")),
    }
    torchs = [i for op, i in ON_CUDA if op is attend]
    assert any(i.accepts(**arguments) for i in torchs)
    assert not any(i.accepts(**{**arguments, **change}) for i in torchs)


def test_products_of_two_dtypes_are_left_to_the_reference() -> None:
    (i,) = (i for op, i in ON_CUDA if op is linear)
    assert i.accepts(torch.zeros(2, 8), matrix(torch.float32, 3, 8))
    assert not i.accepts(torch.zeros(2, 8).half(), matrix(torch.float32, 3, 8))


# ---- Triton's attention over keys side by side


@DTYPES
@pytest.mark.parametrize(("op", "case"), [(o, c) for o in ("attend", "attend_packed") for c in CASES[o]])
def test_tiles_of_queries_give_the_answer_of_the_reference(op: str, case: str, device: str, dtype: torch.dtype) -> None:  # noqa: F811
    arguments = CASES[op][case](dtype)
    triton = next(i for i in TABLE[op].implementations if i.backend == "triton")
    if not triton.accepts(*arguments):
        assert any(word in case for word in ("no queries", "nothing")) or not INTERPRETED
        return
    check(op, arguments, device, dtype)


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 70, 70), (2, 17, 65)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1, 64), (2, 1, 80)], ids=str)
def test_tiles_over_several_steps_of_keys(sizes: Any, heads: Any, device: str, dtype: torch.dtype) -> None:  # noqa: F811
    if not INTERPRETED and dtype == torch.float32:
        pytest.skip("float32 queries are torch's on a GPU")
    (batch, queries, keys), (h, kv, dim) = sizes, heads
    made = torch.randn(batch, queries, h + 2, dim).to(dtype)[:, :, 1:-1]  # strided, as q is of a product
    k, v = torch.randn(2, batch, keys, kv, dim).to(dtype)
    mask = torch.rand(batch, 1, queries, keys) < 0.5
    mask[:, :, 3] = False
    bias = torch.randn(1, h, queries, keys)  # float32 beside 16-bit queries
    check("attend", (made, k, v, attention(h, kv, dim, softcap=3.0), mask, bias, torch.randn(h)), device, dtype)


def test_a_query_that_sees_nothing_gets_zeros(device: str) -> None:  # noqa: F811
    arguments = CASES["attend"]["nothing visible"](torch.float16)
    triton = next(i for i in attend.implementations if i.backend == "triton")
    if INTERPRETED:
        assert triton.run(*_onto(arguments, device)).eq(0).all()
    efficient = next(i for _, i in ON_CUDA if i.backend == "efficient")
    assert efficient.run(*_onto(arguments, device)).eq(0).all()


def test_sequences_end_to_end_do_not_see_each_other(device: str) -> None:  # noqa: F811
    q, k, v, starts, a, _ = CASES["attend_packed"]["longer than a tile"](torch.float16)
    placed = _onto((q, k, v, starts), device)
    want = attend_packed(*placed, a, None)
    k[:70], v[:70] = math.nan, math.nan  # all of the first sequence
    got = attend_packed(*_onto((q, k, v, starts), device), a, None)
    assert torch.equal(got[70:], want[70:])
    assert got[:70].isnan().all()
