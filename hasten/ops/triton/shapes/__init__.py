"""Which launch serves a product of few rows: measured for the shapes in this folder's files, one a device; else a rule.

A file is a list of {"dtype", "gated", "height", "columns", "rows", "launch"}: the matrix is (height, columns), rows the
power of two that x's rows are rounded up to, and launch the fields of a `SkinnyLaunch`, or null where cuBLAS is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch

from hasten.ops.triton.arrange import power_of_2, processors
from hasten.ops.triton.shapes.files import records
from hasten.ops.triton.skinny import SkinnyLaunch, skinny_launch

MOST_ROWS = {torch.float32: 16}  # without tensor cores a product soon waits for arithmetic, which cuBLAS does better
Shape = tuple[str, bool, int, int, int]  # dtype, gated, height, columns, rows


def launch_for(
    device: torch.device, dtype: torch.dtype, gated: bool, height: int, columns: int, rows: int
) -> SkinnyLaunch | None:
    """How to multiply `rows` rows by a matrix (height, columns), half of it the gate where gated; None: by cuBLAS."""
    if not 2 <= rows <= MOST_ROWS.get(dtype, 64):
        return None
    shape = (str(dtype)[6:], gated, height, columns, power_of_2(rows))
    known = measured(device)
    return known[shape] if shape in known else skinny_launch(rows, height, columns, dtype.itemsize, processors(device))


@cache
def measured(device: torch.device) -> dict[Shape, SkinnyLaunch | None]:
    """What was measured on such a device, or nothing."""
    return launches(records("skinny", device))


def launches(found: Iterable[Mapping[str, Any]]) -> dict[Shape, SkinnyLaunch | None]:
    """The launches of a file's records."""
    return {
        (r["dtype"], r["gated"], r["height"], r["columns"], r["rows"]): r["launch"] and SkinnyLaunch(**r["launch"])
        for r in found
    }
