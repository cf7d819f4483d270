"""Products of few rows against the references in float64: the kernel with every ending, and the ops that it serves."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.ops import ACTS, GATED, Matrix, Workspace, head, linear, project, up
from hasten.ops.triton import product as module
from hasten.ops.triton import shapes
from hasten.ops.triton.shapes import launch_for
from hasten.ops.triton.skinny import Ending, SkinnyLaunch, multiply, skinny_launch
from hasten.spec import Head, Mlp
from tests.ops.arguments import matrix, norm_layer, random, strided
from tests.ops.test_triton import DTYPES, INTERPRETED, TOLERANCES, device

__all__ = ["device"]  # the fixture: interpreted or compiled

SMALL = SkinnyLaunch(tile=32, block=32, splits=1, warps=4, stages=2, ahead=0)
ROWS = (2, 3, 5, 8, 16, 17, 33, 64)


def move(m: Matrix, device: str) -> Matrix:
    return Matrix(m.weight.to(device), None if m.bias is None else m.bias.to(device))


def wanted(x: Tensor, m: Matrix, e: Ending) -> Tensor:
    """What `Ending` says, in float64."""
    y = x.double() @ m.weight.double().T * e.gain
    y = y if m.bias is None else y + m.bias.double()
    if e.gated:
        y = GATED[e.act](*y.chunk(2, -1))
    elif e.act != "none":
        y = ACTS[e.act](y)
    y = y if e.layer_scale is None else y * e.layer_scale.double()
    y = y if e.residual is None else e.residual.double() + y * e.scale
    return y if e.softcap is None else e.softcap * torch.tanh(y / e.softcap)


def check(x: Tensor, m: Matrix, e: Ending, shape: SkinnyLaunch, device: str) -> None:
    tensors = {name: t.to(device) for name in ("residual", "layer_scale") if (t := getattr(e, name)) is not None}
    got = multiply(x.to(device), move(m, device), replace(e, **tensors), shape)
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    bound = TOLERANCES[x.dtype]
    torch.testing.assert_close(got.cpu().double(), wanted(x, m, e), rtol=bound, atol=bound)


@DTYPES
@pytest.mark.parametrize("rows", ROWS)
def test_product_of_every_number_of_rows(rows: int, device: str, dtype: torch.dtype) -> None:
    # 37 and 70 are no multiples of a tile's 32 rows and 32 columns
    check(random(rows, 70, dtype=dtype), matrix(dtype, 37, 70), Ending(), SMALL, device)


@DTYPES
@pytest.mark.parametrize("columns", [128, 32, 17, 129])
def test_product_of_even_and_odd_columns(columns: int, device: str, dtype: torch.dtype) -> None:
    check(random(5, columns, dtype=dtype), matrix(dtype, 64, columns, bias=False), Ending(), SMALL, device)


@DTYPES
@pytest.mark.parametrize("kind", ACTS)
def test_every_activation(kind: str, device: str, dtype: torch.dtype) -> None:
    check(random(3, 40, dtype=dtype), matrix(dtype, 37, 40), Ending(act=kind), SMALL, device)


@DTYPES
@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("bias", [True, False])
def test_every_gated_activation(kind: str, bias: bool, device: str, dtype: torch.dtype) -> None:
    # 21 outputs: a whole tile of 16, and one with 5
    check(random(3, 40, dtype=dtype), matrix(dtype, 42, 40, bias=bias), Ending(act=kind, gated=True), SMALL, device)


@DTYPES
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_residual_with_its_scales(own: bool, scale: float, device: str, dtype: torch.dtype) -> None:
    residual, layer_scale = random(4, 50, dtype=dtype)[:, 7:44], random(37, dtype=dtype) if own else None
    e = Ending(residual=residual, scale=scale, layer_scale=layer_scale)
    check(random(4, 40, dtype=dtype), matrix(dtype, 37, 40), e, SMALL, device)


@DTYPES
def test_gain_and_softcap(device: str, dtype: torch.dtype) -> None:
    check(random(4, 40, dtype=dtype), matrix(dtype, 37, 40), Ending(gain=0.25, softcap=1.5), SMALL, device)


def test_rows_that_lie_apart(device: str) -> None:
    wide = torch.randn(3, 4, 90)
    for x in (wide[..., 5:75], wide[:, 1:3, 10:80], strided(torch.randn(2, 3, 70))):
        check(x, matrix(torch.float32, 37, 70), Ending(), SMALL, device)


def test_weights_whose_rows_lie_apart(device: str) -> None:
    weight = torch.randn(80, 90)[3:40, 5:75] / 8
    check(torch.randn(5, 70), Matrix(weight), Ending(), SMALL, device)


@settings(max_examples=8, phases=(Phase.explicit, Phase.generate))  # a failing case is small; shrinking takes minutes
@given(
    rows=st.integers(2, 64),
    height=st.integers(1, 70),
    columns=st.integers(1, 200),
    splits=st.integers(1, 7),
    gated=st.booleans(),
)
def test_split_sums_are_the_whole_and_leave_the_counters_zero(
    rows: int, height: int, columns: int, splits: int, gated: bool
) -> None:
    if not INTERPRETED:
        pytest.skip("drawn shapes run in the interpreter")
    x, m = torch.randn(rows, columns), matrix(torch.float32, height * (2 if gated else 1), columns)
    e, shape = Ending(act="silu" if gated else "none", gated=gated), replace(SMALL, splits=splits)
    with Workspace() as workspace:
        got = multiply(x, m, e, shape)
        again = multiply(x, m, e, shape)
        assert not workspace.counters(1, x.device).any()
    assert torch.equal(got, again)
    torch.testing.assert_close(got.double(), wanted(x, m, e), rtol=4e-6, atol=4e-6)


@DTYPES
def test_splits_that_race_give_the_same_numbers_every_time(device: str, dtype: torch.dtype) -> None:
    x, m, shape = random(5, 300, dtype=dtype), matrix(dtype, 100, 300), replace(SMALL, splits=5)
    residual = random(5, 100, dtype=dtype)
    check(x, m, Ending(residual=residual), shape, device)
    placed, moved, e = x.to(device), move(m, device), Ending(residual=residual.to(device))
    with Workspace():
        first, *others = [multiply(placed, moved, e, shape) for _ in range(2 if INTERPRETED else 100)]
    assert all(torch.equal(first, o) for o in others)


def test_a_nan_stays_in_its_row(device: str) -> None:
    x, m = torch.randn(5, 70), matrix(torch.float32, 37, 70)
    x[3, 69] = float("nan")
    got = multiply(x.to(device), move(m, device), Ending(), replace(SMALL, splits=2))
    assert got.isnan().all(-1).tolist() == [False, False, False, True, False]
    assert got.isnan().any(-1).tolist() == [False, False, False, True, False]


# ---- launches


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("height, columns", [(6144, 4096), (4096, 14336), (28672, 4096), (128256, 4096), (40, 17)])
def test_launch_fills_the_device_and_leaves_no_split_without_columns(
    rows: int, itemsize: int, height: int, columns: int
) -> None:
    s = skinny_launch(rows, height, columns, itemsize, 132)
    steps = -(-columns // s.block)
    assert (s.splits - 1) * -(-steps // s.splits) < steps
    assert s.tile <= 32 * s.warps  # a thread for each row that is asked for
    assert s.splits == 1 or -(-height // s.tile) * s.splits <= 4 * 132


@pytest.mark.parametrize(
    "rows, dtype, taken",
    [
        (1, "float16", False),
        (2, "float16", True),
        (64, "bfloat16", True),
        (65, "bfloat16", False),
        (16, "float32", True),
        (17, "float32", False),
    ],
)
def test_rows_that_are_served(rows: int, dtype: str, taken: bool) -> None:
    found = launch_for(torch.device("cpu"), getattr(torch, dtype), False, 640, 320, rows)
    assert (found is not None) == taken


def test_what_was_measured_comes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"dtype": "float16", "gated": False, "height": 640, "columns": 320, "rows": 8}
    rows = [{**shape, "launch": asdict(SMALL)}, {**shape, "rows": 16, "launch": None}]
    monkeypatch.setattr(shapes, "measured", lambda device: shapes.launches(rows))
    found = [launch_for(torch.device("cpu"), torch.float16, False, 640, 320, rows) for rows in (8, 7, 16, 9, 3)]
    assert found == [SMALL, SMALL, None, None, skinny_launch(3, 640, 320, 2, 132)]


def test_every_file_of_measured_launches_holds_launches_that_work() -> None:
    found = shapes.measured(torch.device("cpu"))
    assert found, "tensors on the CPU are launched as on an H100"
    for (_, gated, _, columns, rows), s in found.items():
        assert 2 <= rows <= 64
        assert rows & (rows - 1) == 0
        if s is None:
            continue
        steps = -(-columns // s.block)
        assert (s.splits - 1) * -(-steps // s.splits) < steps
        assert s.tile <= 32 * s.warps
        assert s.ahead % 16 == 0
        assert not gated or s.tile % 16 == 0


# ---- ops


def serving(op: Any) -> Any:
    return next(i for i in op.implementations if i.run.__module__ == module.__name__)


def check_op(op: Any, arguments: tuple[Any, ...], device: str, dtype: torch.dtype) -> None:
    from tests.ops.cases import convert
    from tests.ops.test_turn_heads import place_all

    want = op.reference(*convert(arguments, torch.float64))
    placed, i = place_all(arguments, device), serving(op)
    assert i.accepts(*placed)
    got, bound = i.run(*placed), TOLERANCES[dtype]
    torch.testing.assert_close(got.cpu().double(), want, rtol=bound, atol=bound)


@DTYPES
def test_ops_give_what_their_references_give(device: str, dtype: torch.dtype) -> None:
    x, residual = random(2, 3, 40, dtype=dtype), random(2, 3, 22, dtype=dtype)
    m, n, own = matrix(dtype, 22, 40), norm_layer(dtype, 40), random(22, dtype=dtype)
    check_op(linear, (x, m), device, dtype)
    check_op(head, (x, n, m, Head(False, bias=True, scale=0.25, softcap=3.0)), device, dtype)
    check_op(up, (x, n, m, Mlp(11, "gelu_tanh", True, True)), device, dtype)
    check_op(up, (x, None, m, Mlp(22, "relu2", False, True)), device, dtype)
    check_op(project, (x, m, residual, None, None, 0.3, own), device, dtype)


X, M = torch.zeros(4, 8), matrix(torch.float32, 6, 8)


@pytest.mark.parametrize(
    "x, m",
    [
        (X[:1], M),
        (torch.zeros(65, 8), M),
        (torch.zeros(0, 8), M),
        (X[0], M),
        (X.double(), Matrix(torch.zeros(6, 8, dtype=torch.float64))),
        (X.half(), M),
        (X, Matrix(torch.zeros(8, 6).T)),
        (X.clone().requires_grad_(), M),
    ],
    ids=["one row", "many rows", "empty", "a vector", "float64", "wider weights", "columns side by side", "gradient"],
)
def test_other_products_are_not_served(x: Tensor, m: Matrix) -> None:
    assert not serving(linear).accepts(x, m)


def test_projections_with_norms_or_another_residual_are_not_served() -> None:
    accepts, y = serving(project).accepts, torch.zeros(4, 6)
    assert accepts(X, M, y, None, None, 1.0, None)
    n = norm_layer(torch.float32, 6)
    for arguments in (
        (y, n, None, 1.0, None),
        (y, None, n, 1.0, None),
        (y.half(), None, None, 1.0, None),
        (y[:1], None, None, 1.0, None),
        (y, None, None, 1.0, torch.zeros(6).half()),
    ):
        assert not accepts(X, M, *arguments)
