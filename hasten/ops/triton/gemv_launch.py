"""How a product of one row is cut into programs: sizes in, a launch out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from hasten.ops.triton.arrange import power_of_2, processors
from hasten.ops.triton.shapes.files import records


@dataclass(frozen=True, slots=True)
class GemvLaunch:
    rows: int  # of the matrix in one program; twice as many where they come in pairs
    block: int  # columns, in a power of two
    warps: int
    late: bool = False


@lru_cache(1024)
def gemv_launch(rows: int, columns: int, itemsize: int, pairs: bool, device: torch.device) -> GemvLaunch:
    """As measured for this shape on such a device, else about 16 KiB of weights a program and 32 numbers a thread.

    rows: of the answer, or pairs of rows where two belong together: gate and up, or the two that turn.
    """
    block = power_of_2(columns)
    for r in records("gemv", device):
        if (r["rows"], r["columns"], r["itemsize"], r["pairs"]) == (rows, columns, itemsize, pairs):
            return GemvLaunch(r["launch"]["rows"], block, r["launch"]["warps"])
    row = (2 if pairs else 1) * block
    count = max(1, 16384 // (row * itemsize))
    while count > 1 and rows < count * 4 * processors(device):
        count //= 2
    return GemvLaunch(rows=count, block=block, warps=min(max(count * row // 1024, 2), 16))
