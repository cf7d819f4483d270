"""How a product of one row is cut into programs: sizes in, a launch out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from hasten.ops.triton.arrange import cdiv, power_of_2, processors
from hasten.ops.triton.shapes.files import records

NARROWEST = 256
"""Columns of a piece, at least: 16-bit numbers that a warp loads at once."""


@dataclass(frozen=True, slots=True)
class GemvLaunch:
    rows: int  # of the matrix in one program; twice as many where they come in pairs
    block: int  # columns in a piece of a row, a power of two
    warps: int


@lru_cache(1024)
def gemv_launch(rows: int, columns: int, itemsize: int, pairs: bool, device: torch.device) -> GemvLaunch:
    """As measured for this shape on such a device, else about 16 KiB of weights a program and 32 numbers a thread.

    rows: of the answer, or pairs of rows where two belong together: gate and up, or the two that turn.
    """
    for r in records("gemv", device):
        if (r["rows"], r["columns"], r["itemsize"], r["pairs"]) == (rows, columns, itemsize, pairs):
            measured = r["launch"]
            return GemvLaunch(measured["rows"], measured.get("block", power_of_2(columns)), measured["warps"])
    block = piece(columns)
    row = (2 if pairs else 1) * block * cdiv(columns, block)
    count = power_of_2(max(1, 16384 // (row * itemsize)) + 1) // 2  # rounded down
    while count > 1 and rows < count * 4 * processors(device):
        count //= 2
    warps = max(count * row // 1024, 2) if block >= columns else block * itemsize // 512
    return GemvLaunch(rows=count, block=block, warps=min(warps, 16))


def piece(columns: int) -> int:
    """Columns of a piece: the whole row, or, where a third of its lanes would idle, a half to an eighth of that.

    A piece is then as wide as its warps load at once, 16 bytes a thread, so that no number changes threads.
    """
    whole = power_of_2(columns)
    smaller = [whole >> i for i in range(1, 4) if 3 * columns <= 2 * whole and whole >> i >= NARROWEST]
    return next((b for b in smaller if 6 * (cdiv(columns, b) * b - columns) <= columns), whole)
