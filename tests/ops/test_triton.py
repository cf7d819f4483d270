"""Triton's kernels against the references in float64: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.errors import ConfigError
from hasten.ops import ACTS, GATED, TABLE, NormLayer, act, attend_pages, gated, norm, rope, rope_table, use
from hasten.ops.backends import load
from hasten.spec import Attention, Norm, Rope
from tests.ops.cases import CASES, convert, tensors

pytest.importorskip("triton", reason="Triton has no build for this platform")
load()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPS = ("norm", "act", "gated", "rope", "write_pages", "attend_pages")

# dtype -> how far an answer of size s may lie from the float64 one: bound * (1 + s)
TOLERANCES = {
    torch.float32: 4e-6,  # sums of up to 256 products of size one; exp2, rsqrt and quotients to 3 units of 6e-8
    torch.float16: 2e-3,  # one rounding of the answer, one of each share of attention or of norm and weight: 4.9e-4
    torch.bfloat16: 2e-2,  # the same two at 3.9e-3 each; the interpreter truncates instead of rounding: twice that
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d)[6:])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if (request.param == "cpu") != INTERPRETED:
        pytest.skip(
            "kernels are interpreted on the CPU, where TRITON_INTERPRET=1, and compiled on a GPU, where it is unset"
        )
    return request.param


def place(value: Any, device: str) -> Any:
    """The same arguments on a device, strides kept."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
    if is_dataclass(value) and not isinstance(value, type):
        inside = {f.name: getattr(value, f.name) for f in fields(value)}
        moved = {name: place(v, device) for name, v in inside.items() if isinstance(v, Tensor)}
        return replace(value, **moved) if moved else value
    return tuple(place(v, device) for v in value) if isinstance(value, tuple) else value


def check(op: str, arguments: tuple[Any, ...], device: str, dtype: torch.dtype) -> None:
    """What Triton's implementation leaves behind, answer and arguments, is what the reference leaves in float64."""
    wide = convert(arguments, torch.float64)
    want = tensors(TABLE[op].reference(*wide)) + tensors(wide)
    placed = place(arguments, device)
    with use("triton"):
        got = tensors(TABLE[op](*placed)) + tensors(placed)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        bound = TOLERANCES[dtype]
        torch.testing.assert_close(g.cpu().double(), w.double(), rtol=bound, atol=bound)


@DTYPES
@pytest.mark.parametrize(("op", "case"), [(op, case) for op in OPS for case in CASES[op]])
def test_answer_is_that_of_the_reference_in_float64(op: str, case: str, device: str, dtype: torch.dtype) -> None:
    check(op, CASES[op][case](dtype), device, dtype)


def test_every_curve_has_a_kernel() -> None:
    x = torch.zeros(2, 8)
    for op, kinds in ((act, ACTS), (gated, GATED)):
        accepts = next(i.accepts for i in op.implementations if i.backend == "triton")
        assert all(accepts(x, kind) for kind in kinds)
        assert not accepts(x, "sine")


# ---- rows


@settings(max_examples=12)
@given(
    outer=st.integers(1, 4), inner=st.integers(1, 5), width=st.integers(1, 300), kind=st.sampled_from(("layer", "rms"))
)
def test_norm_takes_any_width_and_rows_that_lie_apart(outer: int, inner: int, width: int, kind: Any) -> None:
    if not INTERPRETED:
        pytest.skip("drawn shapes run in the interpreter")
    x = torch.randn(outer, inner + 2, width + 3)[:, 1:-1, 2:-1]  # a slice, as q is of the product that made q, k and v
    n = NormLayer(
        Norm(kind, 1e-5, bias=kind == "layer"), torch.randn(width), torch.randn(width) if kind == "layer" else None
    )
    check("norm", (x, n), "cpu", torch.float32)


@DTYPES
def test_norm_of_a_row_wider_than_one_wave_of_loads(device: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 9001).to(dtype)
    check("norm", (x, NormLayer(Norm("layer", 1e-5, True), *torch.randn(2, 9001).to(dtype))), device, dtype)


def test_norm_with_float32_weights_of_16_bit_rows(device: str) -> None:
    layer = NormLayer(Norm("rms", 1e-6, offset=1.0, wide=True), torch.randn(40))
    check("norm", (torch.randn(5, 40).bfloat16(), layer), device, torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "width"),
    [(torch.zeros(2, 8, dtype=torch.float64), 8), (torch.zeros(2, 40000), 40000), (torch.zeros(2, 8), 4)],
)
def test_norm_leaves_to_the_reference_what_it_does_not_take(x: Tensor, width: int) -> None:
    with use("triton"), pytest.raises(ConfigError, match="norm has no triton implementation"):
        norm(x, NormLayer(Norm("rms", 1e-6), torch.ones(width)))


def test_kernels_refuse_tensors_that_want_a_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    with use("triton"), pytest.raises(ConfigError):
        act(x, "relu")
    if INTERPRETED:
        with use("triton"), torch.no_grad():
            act(x, "relu")


@pytest.mark.parametrize("kind", ACTS)
def test_curves_hold_at_the_ends_and_near_zero(kind: str, device: str) -> None:
    x = torch.tensor([-3e4, -100.0, -20.0, -1e-3, -1e-7, 0.0, 1e-7, 1e-3, 0.2499, 0.2501, 20.0, 100.0, 3e4])
    with use("triton"):
        got = act(x.to(device), kind).cpu().double()
    want = act.reference(x.double(), kind)
    # relative, but for 1 + erf(x) of gelu, which cancels to steps of 6e-8 times x left of zero
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6 if kind.startswith("gelu") else 1e-12)


def test_clamped_swiglu_clamps_both_halves(device: str) -> None:
    ends = torch.cartesian_prod(*(torch.tensor([-20.0, -7.5, -6.5, 6.5, 7.5, 20.0]),) * 2)
    check("gated", (ends.T.reshape(1, -1), "clamped_swiglu"), device, torch.float32)


@pytest.mark.parametrize("kind", ACTS)
def test_a_nan_stays_a_nan(kind: str, device: str) -> None:
    with use("triton"):
        assert act(torch.tensor([1.0, float("nan")], device=device), kind).isnan().tolist() == [False, True]


@DTYPES
@pytest.mark.parametrize("pairing", ["halves", "neighbours"])
def test_rope_passes_the_tail_through_bit_for_bit(pairing: Any, device: str, dtype: torch.dtype) -> None:
    r = Rope(20, 1e4, pairing)
    x = torch.randn(2, 7, 9, 80).to(dtype).to(device)[:, :, 2:7]
    turn = tuple(t.to(device) for t in rope_table(r, torch.arange(7), 7))  # (tokens, 10), the same for both batches
    with use("triton"):
        y = rope(x, *turn, r)
    assert torch.equal(y[..., 20:], x[..., 20:])
    check("rope", (x.cpu(), *(t.cpu().repeat(2, 1, 1) for t in turn), r), device, dtype)


# ---- pages


@DTYPES
def test_write_pages_reads_slices_and_fills_pools_of_another_dtype(device: str, dtype: torch.dtype) -> None:
    both = torch.randn(5, 70, 24).to(
        dtype
    )  # k and v side by side, as the product leaves them; 35 heads, two programs each
    k, v = both[:, :35], both[:, 35:]
    keys, values = (torch.randn(3, 16, 35, 24).bfloat16() for _ in range(2))
    check("write_pages", (k, v, keys, values, torch.tensor([40, -1, 0, 47, 3])), device, torch.bfloat16)


def batch(
    lengths: tuple[int, ...], new: tuple[int, ...], heads: tuple[int, int, int], page: int = 16, **more: Any
) -> tuple[Any, ...]:
    """float32 arguments of attend_pages, pages in no order, with slopes and sinks."""
    h, kv, dim = heads
    most = max(-(-n // page) for n in lengths)
    tables = 1 + torch.randperm(most * len(lengths)).view(len(lengths), most).int()  # page 0 is nobody's
    keys, values = torch.randn(2, most * len(lengths) + 1, page, kv, dim).unbind()
    starts = torch.tensor((0, *new)).cumsum(0).int()
    a = Attention(h, kv, dim, dim**-0.5, True, "", **more)
    q = torch.randn(sum(new), h + 2, dim)[:, 1:-1]
    return q, keys, values, tables, starts, torch.tensor(lengths).int(), a, torch.linspace(0.01, 0.5, h), torch.randn(h)


MIXED = ((70, 5, 45, 18), (1, 5, 20, 18))  # a token behind 69, a short prompt, a chunk of one, and another prompt


@DTYPES
@pytest.mark.parametrize("heads", [(4, 2, 80), (3, 1, 96), (2, 2, 112), (7, 1, 64), (6, 2, 20)], ids=str)
def test_attention_takes_every_group_and_head_width(
    heads: tuple[int, int, int], device: str, dtype: torch.dtype
) -> None:
    check("attend_pages", convert(batch((70, 33), (1, 3), heads), dtype), device, dtype)


@pytest.mark.parametrize("heads", [(2, 1, 256), (71, 1, 64)], ids=str)
def test_attention_takes_the_widest_heads_and_groups(heads: tuple[int, int, int], device: str) -> None:
    check("attend_pages", convert(batch((40,), (2,), heads), torch.float16), device, torch.float16)


@DTYPES
@pytest.mark.parametrize("more", [{}, {"window": 37}, {"softcap": 2.0}, {"window": 20, "softcap": 5.0}], ids=str)
def test_attention_over_mixed_batches(more: dict[str, Any], device: str, dtype: torch.dtype) -> None:
    arguments = convert(batch(*MIXED, (4, 1, 24), **more), dtype)
    check("attend_pages", arguments, device, dtype)


@DTYPES
def test_attention_without_slopes_or_sinks(device: str, dtype: torch.dtype) -> None:
    arguments = convert(batch((70, 3), (1, 3), (4, 2, 24)), dtype)
    check("attend_pages", (*arguments[:-2], None, None), device, dtype)


@settings(max_examples=6)
@given(
    new=st.lists(st.integers(0, 12), min_size=1, max_size=3).filter(any),
    earlier=st.lists(st.integers(1, 70), min_size=3, max_size=3),
    group=st.integers(1, 5),
    page=st.sampled_from((16, 24)),
    window=st.none() | st.integers(1, 60),
)
def test_attention_takes_any_batch(
    new: list[int], earlier: list[int], group: int, page: int, window: int | None
) -> None:
    if not INTERPRETED:
        pytest.skip("drawn shapes run in the interpreter")
    lengths = tuple(a + b for a, b in zip(earlier, new, strict=False))
    check("attend_pages", batch(lengths, tuple(new), (2 * group, 2, 16), page, window=window), "cpu", torch.float32)


def test_attention_with_pools_of_another_dtype_and_wide_tables(device: str) -> None:
    q, keys, values, tables, *rest = batch(*MIXED, (2, 1, 16))
    arguments = (q.half(), keys.bfloat16(), values.bfloat16(), tables.long(), *(t.long() for t in rest[:2]), *rest[2:])
    check("attend_pages", arguments, device, torch.float16)


def run(device: str, arguments: tuple[Any, ...]) -> Tensor:
    with use("triton"):
        return attend_pages(*place(arguments, device)).cpu()


def test_the_order_of_pages_changes_nothing(device: str) -> None:
    q, keys, values, tables, *rest = batch(*MIXED, (2, 1, 16))
    order = torch.randperm(len(keys))
    moved = (q, keys[order], values[order], order.argsort()[tables.long()].int(), *rest)
    assert torch.equal(run(device, moved), run(device, (q, keys, values, tables, *rest)))


def test_chunks_of_a_prompt_give_what_the_whole_prompt_gives(device: str) -> None:
    q, keys, values, tables, _, _, *rest = batch((70,), (70,), (4, 1, 16), window=50)
    ends = (0, 1, 20, 64, 69, 70)

    def part(first: int, last: int) -> Tensor:
        return run(
            device, (q[first:last], keys, values, tables, torch.tensor([0, last - first]), torch.tensor([last]), *rest)
        )

    chunks = torch.cat([part(first, last) for first, last in zip(ends, ends[1:], strict=False)])
    torch.testing.assert_close(chunks, part(0, 70), rtol=2e-6, atol=2e-6)


def test_what_lies_behind_a_sequence_in_its_pages_is_never_read(device: str) -> None:
    q, keys, values, tables, starts, lengths, *rest = batch(*MIXED, (2, 1, 16))
    want = run(device, (q, keys, values, tables, starts, lengths, *rest))
    owner = torch.zeros(keys.shape[:2], dtype=torch.bool)
    for table, length in zip(tables.long(), lengths.tolist(), strict=True):
        owner.view(-1)[(table[:, None] * 16 + torch.arange(16)).flatten()[:length]] = True
    for pool in (keys, values):
        pool[~owner] = float("nan")
    for table, length in zip(tables, lengths.tolist(), strict=True):
        table[-(-length // 16) :] = 2**30  # what stands behind a sequence's last page is no page
    assert torch.equal(run(device, (q, keys, values, tables, starts, lengths, *rest)), want)


def test_a_split_row_equals_the_row_that_one_program_computes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.ops.triton import attend_pages as module

    arguments = batch((333, 64, 1), (1, 1, 1), (6, 1, 24))
    launch, shapes = module.attend_launch, []

    def counted(change: Callable[..., Any]) -> Tensor:
        monkeypatch.setattr(module, "attend_launch", lambda *a: shapes.append(change(launch(*a))) or shapes[-1])
        return run(device, arguments)

    split, whole = counted(lambda s: s), counted(lambda s: replace(s, splits=1))
    assert [s.splits for s in shapes] == [16, 1]
    torch.testing.assert_close(split, whole, rtol=2e-6, atol=2e-6)
