"""Products of many rows, whole and split, and the regions that end with them, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.ops import Matrix, linear, norm, up
from hasten.ops.region import project, project_normed
from hasten.spec import Mlp
from tests.ops.arguments import convert, matrix, norm_layer, random

pytest.importorskip("triton", reason="Triton has no build for this platform")

from hasten.ops.triton import many_rows  # noqa: E402
from hasten.ops.triton.gemm import GemmLaunch, gemm_launch, multiply  # noqa: E402
from hasten.ops.triton.gemm_wide import WideLaunch, multiply_wide, wide_launch  # noqa: E402
from hasten.ops.triton.sums import add_up  # noqa: E402
from tests.ops.test_triton import DTYPES, INTERPRETED, device, place  # noqa: E402, F401 - a fixture

# dtype -> as in test_triton.py; sums here are of up to 272 products of size one, divided by their square root
TOLERANCES = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL = GemmLaunch(rows=16, columns=32, depth=32, splits=1, group=2, warps=4, stages=2)
LARGE = GemmLaunch(rows=64, columns=64, depth=64, splits=1, group=2, warps=4, stages=2)


def onto(value: Any, where: str) -> Any:
    if hasattr(value, "weight"):
        return type(value)(*(onto(getattr(value, f), where) for f in value.__dataclass_fields__))
    return place(value, where)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.cpu().double(), want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def product(x: Tensor, m: Matrix, shape: GemmLaunch, where: str, columns: int, **more: Any) -> Tensor:
    sizes = (shape.splits, len(x), columns) if shape.splits > 1 else (len(x), columns)
    out = torch.full(sizes, torch.nan, dtype=torch.float32 if shape.splits > 1 else x.dtype, device=where)
    multiply(onto(x, where), onto(m, where), out, shape, **{k: onto(v, where) for k, v in more.items()})
    return out


# ---- the kernel, at any shape


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 1, 16), (16, 32, 32), (37, 50, 80), (70, 33, 272)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
def test_a_product(sizes: tuple[int, int, int], bias: bool, device: str, dtype: torch.dtype) -> None:  # noqa: F811
    rows, columns, depth = sizes
    x, m = random(rows, depth, dtype=dtype), matrix(dtype, columns, depth, bias=bias)
    close(product(x, m, SMALL, device, columns), linear.reference(*convert((x, m), torch.float64)), dtype)


@DTYPES
@pytest.mark.parametrize("splits", [2, 3, 5])
def test_a_split_product_leaves_sums_that_add_up(splits: int, device: str, dtype: torch.dtype) -> None:  # noqa: F811
    x, m = (
        random(37, 272, dtype=dtype),
        matrix(dtype, 50, 272, bias=False),
    )  # nine steps: the last program may have none
    sums = product(x, m, replace(SMALL, splits=splits), device, 50)
    close(sums.double().sum(0), linear.reference(*convert((x, m), torch.float64)), dtype)


@DTYPES
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_a_sum_of_one_step_a_program(splits: int, device: str, dtype: torch.dtype) -> None:  # noqa: F811
    x, m = random(37, 112, dtype=dtype), matrix(dtype, 50, 112, bias=splits == 1)  # the last program has half or none
    shape = GemmLaunch(rows=16, columns=32, depth={1: 128}.get(splits, 64), splits=splits, group=2, warps=4, stages=1)
    got = product(x, m, shape, device, 50).double()
    close(got if splits == 1 else got.sum(0), linear.reference(*convert((x, m), torch.float64)), dtype)


@DTYPES
@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_an_activation_behind_a_product(act: str, device: str, dtype: torch.dtype) -> None:  # noqa: F811
    x, m = random(20, 48, dtype=dtype), matrix(dtype, 40, 48)
    want = up.reference(*convert((x, None, m), torch.float64), Mlp(40, act, False, True))
    close(product(x, m, SMALL, device, 40, act=act), want, dtype)


@DTYPES
@pytest.mark.parametrize("act", ["silu", "gelu", "clamped_swiglu"])
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
def test_a_gated_product(act: str, bias: bool, device: str, dtype: torch.dtype) -> None:  # noqa: F811
    x, m = random(20, 80, dtype=dtype, scale=3.0), matrix(dtype, 2 * 40, 80, bias=bias)
    want = up.reference(*convert((x, None, m), torch.float64), Mlp(40, act, True, bias))
    got = product(x, m, SMALL, device, 40, act=act, gated=True)
    bound = TOLERANCES[dtype] * 3  # factors of up to 10
    torch.testing.assert_close(got.cpu().double(), want, rtol=bound, atol=bound)


def test_rows_that_lie_apart_and_a_residual_of_another_stride(device: str) -> None:  # noqa: F811
    x, m = random(20, 3 * 48, dtype=torch.float16)[:, 48:96], matrix(torch.float16, 40, 48)
    residual, own = random(20, 80, dtype=torch.float16)[:, 16:56], random(40, dtype=torch.float16)
    want = project.reference(*convert((x, m, residual, None, None, 0.5, own), torch.float64))
    got = product(x, m, SMALL, device, 40, residual=residual, scale=0.5, layer_scale=own)
    close(got, want, torch.float16)


def test_a_nan_stays_in_its_row(device: str) -> None:  # noqa: F811
    x, m = random(20, 48, dtype=torch.float16), matrix(torch.float16, 40, 48)
    x[7, 3] = torch.nan
    got = product(x, m, SMALL, device, 40)
    assert got.isnan().any(1).nonzero().flatten().tolist() == [7]


# ---- the kernel for thousands of rows, on few


WIDE = WideLaunch(rows=16, columns=32, depth=32, group=2, programs=3, warps=4, stages=2)


@DTYPES
@pytest.mark.parametrize("act", ["none", "gelu"])
@pytest.mark.parametrize("sizes", [(1, 8, 16), (37, 40, 80)], ids=str)
def test_a_product_by_programs_that_go_through_tiles(
    sizes: tuple[int, int, int],
    act: str,
    device: str,  # noqa: F811
    dtype: torch.dtype,
) -> None:
    rows, columns, depth = sizes
    x, m, residual = random(rows, depth, dtype=dtype), matrix(dtype, columns, depth), random(rows, columns, dtype=dtype)
    own = random(columns, dtype=dtype)
    wide = convert((x, m, residual, own), torch.float64)
    y = (
        linear.reference(*wide[:2])
        if act == "none"
        else up.reference(wide[0], None, wide[1], Mlp(columns, act, False, True))
    )
    for more, want in (
        ({}, y),
        ({"residual": residual, "scale": 0.5, "layer_scale": own}, wide[2] + y * wide[3] * 0.5),
    ):
        out = torch.full((rows, columns), torch.nan, dtype=dtype, device=device)
        placed = {k: onto(v, device) for k, v in more.items()}
        multiply_wide(onto(x, device), onto(m, device), out, WIDE, act=act, **placed)
        close(out, want, dtype)


def test_thousands_of_rows_go_through_tiles_of_128_by_256() -> None:
    shape = wide_launch(4096, 4096, 132)
    assert shape is not None
    assert (shape.rows, shape.columns, shape.programs) == (128, 256, 132)
    assert wide_launch(128, 4096, 132) is None  # 16 tiles
    assert wide_launch(4480, 1024, 132) is None  # 140 tiles: eight of them alone in a second round
    assert wide_launch(12608, 1024, 132) == shape


# ---- the second half of a split product


@DTYPES
@pytest.mark.parametrize("inner", [None, "rms", "layer"])
@pytest.mark.parametrize("outer", [None, "layer", "rms"])
def test_sums_are_added_up_and_finished(inner: Any, outer: Any, device: str, dtype: torch.dtype) -> None:  # noqa: F811
    sums, bias, residual = torch.randn(3, 2 * 5, 37) / 2, random(37, dtype=dtype), random(2, 5, 37, dtype=dtype)
    norms = [None if k is None else norm_layer(dtype, 37, kind=k, bias=k == "layer") for k in (inner, outer)]
    own = random(37, dtype=dtype) if inner is None else None
    eye = Matrix(torch.eye(37, dtype=torch.float64), bias.double())
    x = sums.double().sum(0).view(2, 5, 37)
    rest = (*norms, 0.5, own)
    want = project.reference(x, eye, *convert((residual, *rest), torch.float64))
    got, none = add_up(*(onto(t, device) for t in (sums, bias, residual, *rest)))  # pyright: ignore[reportCallIssue]
    assert got.dtype == dtype and none is None
    close(got, want, dtype)


@DTYPES
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_of_the_finished_sum(kind: str, device: str, dtype: torch.dtype) -> None:  # noqa: F811
    sums, bias, residual = torch.randn(2, 5, 37) / 2, random(37, dtype=dtype), random(5, 37, dtype=dtype)
    outer, then = norm_layer(dtype, 37, kind="layer"), norm_layer(dtype, 37, kind=kind, bias=kind == "layer")
    given = [onto(t, device) for t in (sums, bias, residual, None, outer, 0.5, None, then)]
    alone, _ = add_up(*given[:-1])  # pyright: ignore[reportArgumentType]
    got, normed = add_up(*given)  # pyright: ignore[reportArgumentType]
    assert normed is not None and normed.dtype == dtype and got.equal(alone)
    close(normed, norm(got.cpu().double(), convert(then, torch.float64)), dtype)


# ---- regions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_regions_take_the_kernels(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(many_rows, "gemm_launch", lambda *a: replace(LARGE, splits=2 if a[4] else 1))
    monkeypatch.setattr(many_rows, "COLUMNS", 0)
    x, residual = random(3, 33, 128, dtype=dtype), random(3, 33, 48, dtype=dtype)
    plain, gate = matrix(dtype, 48, 128), matrix(dtype, 2 * 48, 128)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (linear, (x, plain)),
        (up, (x, norm_layer(dtype, 128), gate, Mlp(48, "silu", True, True))),
        (project, (x, plain, residual, None, norm_layer(dtype, 48), 1.0, None)),
        (project, (x, plain, residual, None, None, 0.5, None)),
        (project_normed, (x, plain, residual, None, None, 0.5, None, norm_layer(dtype, 48))),
    ]
    for op, arguments in calls:
        mine = next(i for i in op.implementations if i.run.__module__ == many_rows.__name__)
        assert mine.accepts(*arguments)
        got = mine.run(*(onto(a, device) for a in arguments))
        if op is project_normed:
            got, normed = got
            close(normed, norm(got.cpu().double(), convert(arguments[-1], torch.float64)), dtype)
            op = project
            arguments = arguments[:-1]
        want = op.reference(*convert(arguments, torch.float64))
        bound = TOLERANCES[dtype] * 2  # the norm before `up` rounds too
        torch.testing.assert_close(got.cpu().double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, m: (x[:96], m),
        lambda x, m: (x.double(), Matrix(m.weight.double())),
        lambda x, m: (x, Matrix(m.weight.float())),
        lambda x, m: (x, Matrix(m.weight.mT.contiguous().mT)),
        lambda x, m: (x[:, :40], Matrix(m.weight[:, :40].contiguous())),
        lambda x, m: (x.expand(2, 100, 64), m),
        lambda x, m: (x.new_empty(100, 2**12), Matrix(x.new_empty(2**11, 2**12))),
        lambda x, m: (x, Matrix(m.weight[:1024].contiguous())),
    ],
    ids=[
        "few rows",
        "float64",
        "two dtypes",
        "transposed",
        "narrow reads",
        "cuBLAS' rows",
        "cuBLAS' matrices",
        "few columns",
    ],
)
def test_linear_leaves_to_others_what_they_do_better(change: Any) -> None:
    mine = next(i for i in linear.implementations if i.run.__module__ == many_rows.__name__)
    x, m = random(100, 64, dtype=torch.float16), matrix(torch.float16, 2048, 64, bias=False)
    assert mine.accepts(x, m)
    assert not mine.accepts(*change(x, m))


@pytest.mark.parametrize(
    ("rows", "act", "gated", "bias", "mine"),
    [
        (128, "gelu_tanh", False, True, True),
        (128, "silu", True, False, True),
        (129, "gelu", False, True, False),
        (2048, "gelu", False, True, False),  # what cuBLAS makes lies in the cache
        (4096, "gelu", False, True, True),
        (12608, "gelu", False, True, True),
        (12608, "gelu_tanh", False, True, False),  # cuBLAS applies it
        (12608, "gelu_tanh", False, False, True),
        (4096, "silu", True, False, False),
    ],
)
def test_activations_behind_many_rows(rows: int, act: str, gated: bool, bias: bool, mine: bool) -> None:
    x = torch.empty(rows, 64, dtype=torch.float16)
    m = matrix(torch.float16, 4096, 64, bias=bias)
    implementation = next(i for i in up.implementations if i.run.__module__ == many_rows.__name__)
    assert implementation.accepts(x, None, m, Mlp(2048 if gated else 4096, act, gated, bias)) == mine


# ---- launch shapes


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "splits", "tile", "shares"),
    [
        (128, 4096, 1024, False, (128, 32), 1),
        (128, 1024, 1024, True, (64, 64), 2),
        (128, 1024, 512, True, (128, 32), 1),
        (128, 1024, 1040, True, (128, 32), 2),
        (128, 1024, 4096, True, (128, 32), 4),
        (128, 1024, 1024, False, (128, 32), 1),
        (197, 1024, 1024, True, (64, 64), 2),
        (256, 2048, 1024, True, (128, 64), 2),
        (197, 1024, 4096, True, (128, 64), 4),
        (512, 1024, 4096, True, (128, 64), 2),
    ],
)
def test_launches_keep_every_processor_busy(
    rows: int, columns: int, depth: int, splits: bool, tile: tuple[int, int], shares: int
) -> None:
    shape = gemm_launch(rows, columns, depth, False, splits, 132)
    assert ((shape.rows, shape.columns), shape.splits) == (tile, shares)
