"""Products of a few rows: weights are the tall operand of the matrix instruction, rows of x the narrow one.

Two to sixty-four rows wait for the weights to come from memory, whatever they compute. So every program asks for its
first weights before it waits for the kernel that makes x; a short matrix splits its columns over several programs, the
last of which adds the sums up in order; and what follows the product happens while the sums are still in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.linear import Matrix
from hasten.ops.triton.act import curve, gated_curve
from hasten.ops.triton.arrange import cdiv, dense, interpreted, on, power_of_2
from hasten.ops.triton.curves import tanh
from hasten.ops.triton.launch import dependent, go, wait
from hasten.ops.workspace import counters


@triton.jit
def matrix_rows(i, tile, width, OUT: tl.constexpr, GATED: tl.constexpr):
    """The matrix's row behind row i of a tile of weights; the last one again where there are no more.

    Gated, eight rows of the gate alternate with their eight of the other half: matrix instructions leave rows r and
    r + 8 of their answer to one thread, which so has both factors.
    """
    if GATED:
        return tl.minimum(tile * OUT + i // 16 * 8 + i % 8, width - 1) + i // 8 % 2 * width
    return tl.minimum(tile * OUT + i, width - 1)


@triton.jit
def fetch(weight, row, column, w_row, asked, AHEAD: tl.constexpr):
    """Start AHEAD bytes of every row that is `asked` for, from `column` on, on their way into the second-level cache.

    One row for each thread: rows that fewer threads could hold would be asked for several times.
    """
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.u32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;}",
        "=r,l,r",
        [(weight + row.to(tl.int64) * w_row + column).to(tl.int64), tl.where(asked, AHEAD, 0)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def summed(partial, arrived, y, tile, split, SPLITS: tl.constexpr):
    """(whether this program is the tile's last, the sum of all splits in order if it is).

    Reads past the first-level cache, which does not see what other processors write.
    """
    ROWS: tl.constexpr = y.shape[0]
    COLUMNS: tl.constexpr = y.shape[1]
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    left = partial + tile.to(tl.int64) * (SPLITS * ROWS * COLUMNS) + at
    tl.store(left + split * (ROWS * COLUMNS), y)
    tl.debug_barrier()  # every thread's stores come before the one thread's release below
    last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(arrived + tile, 0)
        y = tl.zeros((ROWS, COLUMNS), tl.float32)
        for s in tl.static_range(SPLITS):
            y += tl.load(left + s * (ROWS * COLUMNS), cache_modifier=".cg")
    return last, y


@triton.jit(do_not_specialize=("rows",))
def multiply_tile(
    x,
    weight,
    bias,
    residual,
    layer_scale,
    out,
    partial,
    arrived,
    rows,
    width,
    columns,
    x_row,
    w_row,
    residual_row,
    gain,
    scale,
    softcap,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    OUT: tl.constexpr = TILE // 2 if GATED else TILE
    split, tile = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(columns, BLOCK)
    run = tl.cdiv(blocks, SPLITS)
    first, last = split * run, tl.minimum(split * run + run, blocks)
    if PDL and AHEAD:
        t = tl.arange(0, THREADS)
        fetch(weight, matrix_rows(t, tile, width, OUT, GATED), first * BLOCK, w_row, t < TILE, AHEAD)
    row = matrix_rows(tl.arange(0, TILE), tile, width, OUT, GATED)
    m = tl.arange(0, ROWS)
    present = m < rows
    w_at = weight + row.to(tl.int64)[:, None] * w_row
    x_at = x + m.to(tl.int64)[:, None] * x_row
    wait(PDL)

    sums = tl.zeros((TILE, ROWS), tl.float32)
    for block in range(first, last):
        k = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
        if EVEN:
            w = tl.load(w_at + k, eviction_policy="evict_first")
            z = tl.load(x_at + k, mask=present[:, None], other=0.0)
        else:
            w = tl.load(w_at + k, mask=k < columns, other=0.0, eviction_policy="evict_first")
            z = tl.load(x_at + k, mask=present[:, None] & (k < columns), other=0.0)
        sums = tl.dot(w.to(DOT), tl.trans(z.to(DOT)), sums, input_precision="ieee")

    finishes = True
    if SPLITS > 1:
        finishes, sums = summed(partial, arrived, sums, tile, split, SPLITS)
    if finishes:
        sums *= gain
        if bias is not None:
            sums += tl.load(bias + row).to(tl.float32)[:, None]
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(sums, (TILE // 16, 2, 8, ROWS)), (0, 2, 3, 1)))
            y = tl.reshape(gated_curve(gate, up, ACT), (OUT, ROWS))
        elif ACT == "none":
            y = sums
        else:
            y = curve(sums, ACT)
        n = (tile * OUT + tl.arange(0, OUT))[:, None]
        inside = (n < width) & present[None, :]
        if layer_scale is not None:
            y *= tl.load(layer_scale + n, mask=n < width, other=0.0).to(tl.float32)
        if residual is not None:
            r = tl.load(residual + m.to(tl.int64)[None, :] * residual_row + n, mask=inside, other=0.0)
            y = r.to(tl.float32) + y * scale
        if softcap is not None:
            y = softcap * tanh(y / softcap)
        tl.store(out + m.to(tl.int64)[None, :] * width + n, y.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class SkinnyLaunch:
    tile: int  # rows of the matrix in a program
    block: int  # columns in a step of its loop
    splits: int  # programs that share a tile's columns
    warps: int
    stages: int
    ahead: int  # bytes of each row that are asked for before the wait


@dataclass(frozen=True, slots=True, eq=False)
class Ending:
    """What follows the product p: act(gain p + bias), capped; or residual + scale * layer_scale * (gain p + bias)."""

    act: str = "none"
    gated: bool = False
    gain: float = 1.0
    softcap: float | None = None
    residual: Tensor | None = None
    scale: float = 1.0
    layer_scale: Tensor | None = None


@lru_cache(1024)
def skinny_launch(rows: int, height: int, columns: int, itemsize: int, processors: int) -> SkinnyLaunch:
    """Of the shapes for so many rows, the one whose programs fill the processors evenly; all at once where they can.

    height: rows of the matrix. A split keeps at least 512 columns, so that its loads overlap.
    """
    tiles = cdiv(height, 64)
    if itemsize > 2:
        shapes = ((32, 32, 3, 4),)
    elif rows <= 32:
        shapes = ((64, 128, 4, 2), (64, 128, 3, 3))
    else:
        shapes = ((64, 128, 4, 1),) if 2 * tiles <= processors else ((64, 64, 6, 2),)
    best, most = None, 0.0
    for tile, block, stages, beside in shapes:  # beside: programs that a processor has shared memory for
        tiles, steps, room = cdiv(height, tile), cdiv(columns, block), beside * processors
        splits = max(1, min(room // tiles, columns // 512, 8))
        splits = cdiv(steps, cdiv(steps, splits))  # none without a step
        filled = tiles * splits / (cdiv(tiles * splits, room) * room)
        if filled > most:
            best, most = SkinnyLaunch(tile, block, splits, warps=4, stages=stages, ahead=512), filled
    assert best is not None, "a matrix has a row"
    return best


def operands(dtype: torch.dtype) -> torch.dtype:
    """What the matrix product takes: the interpreter multiplies bfloat16 wrongly."""
    return torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype


def _ahead(w: Tensor, shape: SkinnyLaunch) -> int:
    """shape.ahead, where every split's rows have as many bytes and lie as the instruction needs: at multiples of 16."""
    run = cdiv(cdiv(w.shape[1], shape.block), shape.splits) * shape.block
    least = (w.shape[1] - (shape.splits - 1) * run) * w.element_size()
    aligned = w.data_ptr() % 16 == 0 and w.stride(0) * w.element_size() % 16 == 0
    return shape.ahead if aligned and shape.ahead <= least else 0


def multiply(x: Tensor, m: Matrix, e: Ending, shape: SkinnyLaunch) -> Tensor:
    """x (..., columns) of 2 to 64 rows times m, and its ending: (..., width) in x's dtype, which is also m's."""
    w, flat = m.weight, dense(x).flatten(0, -2)
    (height, columns), rows = w.shape, len(flat)
    width = height // 2 if e.gated else height
    out = x.new_empty((*x.shape[:-1], width))
    tiles, padded = cdiv(height, shape.tile), max(power_of_2(rows), 16)
    partial, arrived = None, None
    if shape.splits > 1:
        partial = torch.empty(tiles * shape.splits * shape.tile * padded, dtype=torch.float32, device=x.device)
        arrived = counters(tiles, x.device)
    residual = None if e.residual is None else dense(e.residual).flatten(0, -2)
    with on(x):
        multiply_tile[(shape.splits, tiles)](
            flat,
            w,
            m.bias,
            residual,
            e.layer_scale,
            out,
            partial,
            arrived,
            rows,
            width,
            columns,
            flat.stride(0),
            w.stride(0),
            0 if residual is None else residual.stride(0),
            e.gain,
            e.scale,
            e.softcap,
            ACT=e.act,
            GATED=e.gated,
            TILE=shape.tile,
            ROWS=padded,
            BLOCK=shape.block,
            EVEN=columns % shape.block == 0,
            SPLITS=shape.splits,
            AHEAD=_ahead(w, shape),
            THREADS=32 * shape.warps,
            DOT=getattr(tl, str(operands(w.dtype))[6:]),
            num_warps=shape.warps,
            num_stages=shape.stages,
            **dependent(x.device),
        )
    return out
