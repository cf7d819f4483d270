"""Which launch serves a product of few rows: measured for the shapes in this folder's files, one a device; else a rule.

A file is a list of {"dtype", "gated", "height", "columns", "rows", "launch"}: the matrix is (height, columns), rows the
power of two that x's rows are rounded up to, and launch the fields of a `SkinnyLaunch`, or null where cuBLAS is faster.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
import triton

from hasten.ops.triton.arrange import processors
from hasten.ops.triton.skinny import SkinnyLaunch, skinny_launch

MEASURED = {"H100": "h100.json", "H200": "h100.json"}
"""What a device's name contains, and its file: an H200 has the processors of an H100 and faster memory."""
MOST_ROWS = {torch.float32: 16}  # without tensor cores a product soon waits for arithmetic, which cuBLAS does better
Shape = tuple[str, bool, int, int, int]  # dtype, gated, height, columns, rows


def launch_for(
    device: torch.device, dtype: torch.dtype, gated: bool, height: int, columns: int, rows: int
) -> SkinnyLaunch | None:
    """How to multiply `rows` rows by a matrix (height, columns), half of it the gate where gated; None: by cuBLAS."""
    if not 2 <= rows <= MOST_ROWS.get(dtype, 64):
        return None
    shape = (str(dtype)[6:], gated, height, columns, triton.next_power_of_2(rows))
    known = measured(_name(device))
    return known[shape] if shape in known else skinny_launch(rows, height, columns, dtype.itemsize, processors(device))


@cache
def measured(device: str) -> dict[Shape, SkinnyLaunch | None]:
    """What was measured on a device of this name, or nothing."""
    file = next((f for part, f in MEASURED.items() if part in device), None)
    return {} if file is None else read(Path(__file__).parent / file)


def read(path: Path) -> dict[Shape, SkinnyLaunch | None]:
    """The launches of one file."""
    return {
        (r["dtype"], r["gated"], r["height"], r["columns"], r["rows"]): r["launch"] and SkinnyLaunch(**r["launch"])
        for r in json.loads(path.read_text())
    }


@cache
def _name(device: torch.device) -> str:
    """Tensors on the CPU are compiled for inspection, or interpreted, as for an H100."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "H100"
