"""Triton's `settle` against its reference in float64, interpreted on the CPU and compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.ops import NormLayer, settle, use
from hasten.spec import Norm
from tests.ops.cases import CASES
from tests.ops.test_triton import DTYPES, check, device

__all__ = ["device"]  # the fixture: interpreted or compiled


@DTYPES
@pytest.mark.parametrize("case", CASES["settle"])
def test_answer_is_that_of_the_reference_in_float64(case: str, device: str, dtype: torch.dtype) -> None:
    check("settle", CASES["settle"][case](dtype), device, dtype)


@pytest.mark.parametrize("width", [9001, 16384])
def test_rows_of_the_widest_models(width: int, device: str) -> None:
    n, scales = NormLayer(Norm("layer", 1e-5, True), *torch.randn(2, width)), torch.randn(width)
    check("settle", (*torch.randn(2, 2, width), n, n, 0.5, scales), device, torch.float32)


def test_float32_norms_of_16_bit_rows(device: str) -> None:
    n = NormLayer(Norm("rms", 1e-6, offset=1.0, wide=True), torch.randn(40))
    check("settle", (*torch.randn(2, 5, 40).bfloat16(), n, n, 1.0, None), device, torch.bfloat16)


def test_a_nan_stays_in_its_row(device: str) -> None:
    y, residual = torch.zeros(2, 3, 8, device=device)
    y[1, 5] = float("nan")
    n = NormLayer(Norm("rms", 1e-6), torch.ones(8, device=device))
    with use("triton"):
        got = settle(y, residual, n, None, 1.0, None)
    assert got.isnan().any(-1).tolist() == [False, True, False]


ROWS, WIDE = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.float64)
PER_HEAD = NormLayer(Norm("rms", 1e-6), torch.ones(2, 8))


@pytest.mark.parametrize(
    "arguments",
    [
        (WIDE, WIDE, None, None, 1.0, None),
        (ROWS, WIDE.float().half(), None, None, 1.0, None),
        (ROWS, ROWS[:1], None, None, 1.0, None),
        (ROWS, ROWS, None, PER_HEAD, 1.0, None),
        (ROWS.half(), ROWS.half(), None, None, 1.0, torch.ones(8)),
        (torch.zeros(1, 20000), torch.zeros(1, 20000), None, None, 1.0, None),
    ],
    ids=["float64", "mixed residual", "broadcast residual", "norm per head", "wider layer scale", "too wide"],
)
def test_other_arguments_go_to_the_reference(arguments: tuple[Any, ...]) -> None:
    with use("triton"), pytest.raises(ConfigError, match="settle has no triton implementation"):
        settle(*arguments)
    assert isinstance(settle(*arguments), Tensor)
