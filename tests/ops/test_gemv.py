"""The one-row kernels against the references in float64: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigError
from hasten.ops import ACTS, GATED, Matrix, NormLayer, Slots, linear, project, qkv, rope_table, up, use
from hasten.ops.triton.arrange import cdiv
from hasten.ops.triton.gemv_launch import GemvLaunch, gemv_launch
from hasten.spec import Head, Mlp, Norm, Rope
from tests.ops.arguments import attention, convert, matrix, norm_layer, random, strided
from tests.ops.test_triton import DTYPES, INTERPRETED, check, device, place

__all__ = ["device"]  # a fixture

LAYER: dict[str, Any] = {"kind": "layer"}
RMS = {"kind": "rms", "bias": False}
GEMMA = {"kind": "rms", "bias": False, "offset": 1.0, "wide": True}
NORMS = pytest.mark.parametrize("kind", [LAYER, RMS, GEMMA, None], ids=["layer", "rms", "gemma", "none"])


def row(width: int, d: torch.dtype, gap: bool = False) -> torch.Tensor:
    x = random(1, width, dtype=d) + 0.5  # layer norms have a mean to take away
    return strided(x) if gap else x


def before(kind: dict[str, Any] | None, d: torch.dtype, width: int) -> NormLayer | None:
    return None if kind is None else norm_layer(d, width, **kind)


@DTYPES
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 37), (3, 300)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(rows: int, columns: int, bias: bool, device: str, dtype: torch.dtype) -> None:
    check("linear", (row(columns, dtype), matrix(dtype, rows, columns, bias=bias)), device, dtype)


@DTYPES
def test_linear_takes_rows_that_lie_apart_and_a_strided_x(device: str, dtype: torch.dtype) -> None:
    m = Matrix(matrix(dtype, 40, 70).weight[1:30, :60], random(29, dtype=dtype))
    check("linear", (row(60, dtype, gap=True).view(1, 1, 60), m), device, dtype)


@pytest.mark.parametrize(("act", "gated"), [(act, False) for act in ACTS] + [(act, True) for act in GATED], ids=str)
def test_up_with_every_activation(act: str, gated: bool, device: str) -> None:
    m = matrix(torch.float16, 14 if gated else 7, 37)
    check("up", (row(37, torch.float16), None, m, Mlp(7, act, gated, True)), device, torch.float16)


@DTYPES
@NORMS
@pytest.mark.parametrize("gated", [True, False])
def test_up_behind_any_norm(gated: bool, kind: dict[str, Any] | None, device: str, dtype: torch.dtype) -> None:
    m = matrix(dtype, 10 if gated else 5, 40)
    check("up", (row(40, dtype), before(kind, dtype, 40), m, Mlp(5, "silu", gated, True)), device, dtype)


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("own", [True, False])
def test_project(scale: float, own: bool, device: str, dtype: torch.dtype) -> None:
    layer_scale = random(19, dtype=dtype) if own else None
    arguments = row(45, dtype), matrix(dtype, 19, 45), row(19, dtype), None, None, scale, layer_scale
    check("project", arguments, device, dtype)


@DTYPES
@pytest.mark.parametrize("h", [Head(True), Head(False, bias=True), Head(True, softcap=3.0)], ids=str)
def test_head(h: Head, device: str, dtype: torch.dtype) -> None:
    check("head", (row(37, dtype), before(RMS, dtype, 37), matrix(dtype, 13, 37, bias=h.bias), h), device, dtype)


def turned(
    d: torch.dtype,
    rope: tuple[int, str] | None,
    paged: bool,
    kind: dict[str, Any] | None = RMS,
    slot: int = 7,
    heads: tuple[int, int, int] = (2, 1, 20),
    **more: Any,
) -> tuple[Any, ...]:
    h, kv, dim = heads
    position, turn, into = None, None, None
    if rope is not None:
        position = Rope(rope[0], 100.0, rope[1])  # type: ignore[arg-type]
        turn = rope_table(position, torch.tensor([13]), 64)
    if paged:
        pools = random(2, 3, 5, kv, dim, dtype=d).unbind()
        into = Slots(*pools, torch.tensor([slot]))
    a = attention(h, kv, dim, position=position, **more)
    return row(33, d), before(kind, d, 33), matrix(d, (h + 2 * kv) * dim, 33), a, None, None, turn, into


ROPES = [None, (20, "halves"), (20, "neighbours"), (8, "halves"), (12, "neighbours")]


@DTYPES
@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("paged", [True, False])
def test_qkv(rope: tuple[int, str] | None, paged: bool, device: str, dtype: torch.dtype) -> None:
    check("qkv", turned(dtype, rope, paged), device, dtype)


@DTYPES
@NORMS
def test_qkv_behind_any_norm(kind: dict[str, Any] | None, device: str, dtype: torch.dtype) -> None:
    check("qkv", turned(dtype, (8, "halves"), True, kind, clip=0.7), device, dtype)


@pytest.mark.parametrize("heads", [(3, 1, 6), (5, 5, 10), (6, 2, 2)], ids=str)
def test_qkv_takes_heads_that_no_program_holds_whole(heads: tuple[int, int, int], device: str) -> None:
    check("qkv", turned(torch.float32, (2, "halves"), True, heads=heads), device, torch.float32)


def test_qkv_skips_a_negative_slot(device: str) -> None:
    check("qkv", turned(torch.float32, (8, "halves"), True, slot=-1), device, torch.float32)


@settings(max_examples=8)
@given(rows=st.integers(1, 20), columns=st.integers(1, 700), gated=st.booleans())
def test_any_shape(rows: int, columns: int, gated: bool) -> None:
    if not INTERPRETED:
        pytest.skip("drawn shapes run in the interpreter")
    m = matrix(torch.float32, rows * (2 if gated else 1), columns)
    arguments = row(columns, torch.float32), norm_layer(torch.float32, columns), m, Mlp(rows, "silu", gated, True)
    check("up", arguments, "cpu", torch.float32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.zeros(2, 8), Matrix(torch.zeros(4, 8))),
        lambda: (torch.zeros(0, 8), Matrix(torch.zeros(4, 8))),
        lambda: (torch.zeros(1, 8).half(), Matrix(torch.zeros(4, 8))),
        lambda: (torch.zeros(1, 8), Matrix(torch.zeros(8, 4).T)),
        lambda: (torch.zeros(1, 8).double(), Matrix(torch.zeros(4, 8).double())),
        lambda: (torch.zeros(1, 40000), Matrix(torch.zeros(4, 40000))),
    ],
    ids=["two rows", "no row", "another dtype", "transposed", "float64", "too wide"],
)
def test_what_the_kernel_does_not_take_is_left_to_others(make: Any) -> None:
    from hasten.ops.triton.gemv import one_row

    assert not one_row(*make())


def test_norms_behind_the_matrix_are_left_to_the_composition() -> None:
    arguments = partial(project, torch.zeros(1, 8), Matrix(torch.zeros(4, 8)), torch.zeros(1, 4))
    norm = NormLayer(Norm("rms", 1e-6), torch.ones(4))
    from hasten.ops.triton.gemv import _accepts_project

    assert _accepts_project(*arguments.args, None, None, 1.0, None)
    assert not _accepts_project(*arguments.args, norm, None, 1.0, None)
    assert not _accepts_project(*arguments.args, None, norm, 1.0, None)


def test_gradients_are_refused() -> None:
    m = Matrix(torch.zeros(4, 8, requires_grad=True))
    with use("triton"), pytest.raises(ConfigError):
        linear(torch.zeros(1, 8), m)


def test_q_k_norms_are_left_to_others() -> None:
    x, n, m, a, _, _, turn, into = turned(torch.float32, (8, "halves"), True)
    norm = NormLayer(Norm("rms", 1e-6), torch.ones(20))
    from hasten.ops.triton.gemv_qkv import _accepts

    assert _accepts(x, n, m, a, None, None, turn, into)
    assert not _accepts(x, n, m, a, norm, norm, turn, into)
    assert qkv.reference(x, n, m, a, norm, norm, turn, into)[0].shape == (1, 2, 20)


def cut(monkeypatch: pytest.MonkeyPatch, block: int, rows: int = 2, warps: int = 2) -> None:
    """Rows in pieces of so many columns."""
    from hasten.ops.triton import gemv, gemv_qkv

    for module in (gemv, gemv_qkv):
        monkeypatch.setattr(module, "gemv_launch", lambda *_: GemvLaunch(rows, block, warps))


@NORMS
@pytest.mark.parametrize("columns", [96, 107], ids=str)
def test_rows_in_pieces(
    columns: int, kind: dict[str, Any] | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, 32)
    dtype = torch.float16
    arguments = row(columns, dtype), before(kind, dtype, columns), matrix(dtype, 10, columns)
    check("up", (*arguments, Mlp(5, "silu", True, True)), device, dtype)
    check("qkv", turned(dtype, (8, "halves"), True, kind, clip=0.7), device, dtype)


@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize(("mean", "first"), [(300.0, 0.0), (-3.0, 50.0), (0.0, -2000.0)], ids=str)
def test_a_norm_keeps_its_digits_far_from_zero_and_behind_an_outlier(
    mean: float, first: float, block: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, block)
    x = torch.randn(1, 200) + mean
    x[0, 0] += first
    arguments = x, norm_layer(torch.float32, 200, **LAYER), Matrix(torch.eye(200)[:12]), Mlp(12, "relu", False, False)
    with use("triton"):
        got = up(*place(arguments, device)).cpu()
    want = up.reference(*convert(arguments, torch.float64))
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


def held(shape: GemvLaunch, columns: int, pairs: bool) -> int:
    """Numbers of the matrix in a program, those beyond the row's end too."""
    return shape.rows * (2 if pairs else 1) * cdiv(columns, shape.block) * shape.block


@settings(max_examples=50)
@given(
    rows=st.integers(1, 200000), columns=st.integers(1, 32768), itemsize=st.sampled_from((2, 4)), pairs=st.booleans()
)
def test_every_launch_is_one_that_the_kernel_can_run(rows: int, columns: int, itemsize: int, pairs: bool) -> None:
    shape = gemv_launch(rows, columns, itemsize, pairs, torch.device("cpu"))
    assert all(n > 0 and n & (n - 1) == 0 for n in (shape.rows, shape.block, shape.warps))
    assert shape.block >= columns or 6 * (cdiv(columns, shape.block) * shape.block - columns) <= columns
    assert held(shape, columns, pairs) <= 128 * 32 * shape.warps  # numbers that a thread holds


def test_measured_launches_come_before_the_rule_and_are_ones_that_work() -> None:
    from hasten.ops.triton.shapes.files import records

    found = records("gemv", torch.device("cpu"))
    assert found, "tensors on the CPU are launched as on an H100"
    for r in found:
        shape = gemv_launch(r["rows"], r["columns"], r["itemsize"], r["pairs"], torch.device("cpu"))
        assert {"block": shape.block, "rows": shape.rows, "warps": shape.warps} == {"block": shape.block} | r["launch"]
        assert held(shape, r["columns"], r["pairs"]) <= 192 * 32 * shape.warps
