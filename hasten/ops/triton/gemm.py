"""Products of some hundred rows with a matrix on the tensor cores, and what follows them while they are in registers.

The time is in the weights' way from memory and in the gaps between kernels, so tiles are small, long sums are split
over several programs, and a program sends for its weights before it waits for the kernel that makes x. A split product
leaves its sums in float32; `sums.py` adds them up, in one order whatever happens, and finishes rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hasten.ops.linear import Matrix
from hasten.ops.triton.act import curve, gated_curve
from hasten.ops.triton.arrange import cdiv, interpreted, on
from hasten.ops.triton.launch import dependent, go, wait

ROOM = 200 * 1024  # bytes of a processor's shared memory for steps in flight
HALF = 512  # columns of x and of the matrix whose tiles of 64 rows fit into shared memory at once, and leave room
FEW = 256  # rows up to which weights are sent for early: more rows wait for arithmetic


@triton.jit
def send_for(w, n, columns, first, stop, w_row, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """Bring columns first to stop of matrix rows n, n + 1, ... into the second-level cache, each thread a piece."""
    piece = tl.arange(0, COLUMNS * PIECES)
    row = tl.minimum(n + piece // PIECES, columns - 1)
    size = (stop - first) // (8 * PIECES) * 8  # whole 16 bytes of 16-bit numbers; none where a split has no columns
    at = w + row.to(tl.int64) * w_row + first + piece % PIECES * size
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;}",
        "=r,l,r",
        [at.to(tl.int64), tl.zeros_like(piece) + 2 * size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=("rows",))
def gemm_tile(
    x,
    w,
    weights,
    bias,
    residual,
    layer_scale,
    out,
    rows,
    columns,
    depth,
    w_row,
    residual_row,
    scale,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """x and w are descriptors of matrices, w that of `weights`; what lies beyond their ends is read as zeros.

    WHOLE: a program's sum is one step, whose weights are in shared memory before the kernel that makes x has ended.
    """
    go(PDL)
    # tiles in groups of GROUP rows of tiles, so that programs that run together share what they read
    tile = tl.program_id(0)
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    group = tile // (GROUP * across)
    high = tl.minimum(down - group * GROUP, GROUP)
    within = tile % (GROUP * across)
    top, left = (group * GROUP + within % high) * ROWS, within // high * COLUMNS

    split = tl.program_id(1)
    run = tl.cdiv(tl.cdiv(depth, DEPTH), SPLITS) * DEPTH
    first = split * run
    stop = tl.minimum(first + run, depth)
    if PDL and PIECES > 0:
        send_for(weights, left, columns, first, stop, w_row, COLUMNS, PIECES)
        if GATED:
            send_for(weights + columns.to(tl.int64) * w_row, left, columns, first, stop, w_row, COLUMNS, PIECES)
    if WHOLE:
        b = w.load([left, first])
        wait(PDL)
        y = tl.dot(x.load([top, first]).to(DOT), b.to(DOT).T, input_precision="ieee")
    else:
        wait(PDL)
        y = tl.zeros((ROWS, COLUMNS), tl.float32)
        if GATED:
            u = tl.zeros((ROWS, COLUMNS), tl.float32)
        for at in range(first, stop, DEPTH):
            a, b = x.load([top, at]), w.load([left, at])
            y = tl.dot(a.to(DOT), b.to(DOT).T, y, input_precision="ieee")
            if GATED:
                c = w.load([columns + left, at])
                u = tl.dot(a.to(DOT), c.to(DOT).T, u, input_precision="ieee")

    m, n = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    if SPLITS > 1:
        into = (split * rows + m).to(tl.int64)[:, None] * columns + n[None, :]
        tl.store(out + into, y, mask=inside)
        return
    if bias is not None:
        y += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if bias is not None:
            u += tl.load(bias + columns + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        y = gated_curve(y, u, ACT)
    elif ACT != "none":
        y = curve(y, ACT)
    if layer_scale is not None:
        y *= tl.load(layer_scale + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        beside = residual + m.to(tl.int64)[:, None] * residual_row + n[None, :]
        y = y * scale + tl.load(beside, mask=inside, other=0.0).to(tl.float32)
    into = m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(out + into, y.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class GemmLaunch:
    rows: int  # of a tile
    columns: int  # of a tile, and as many again where gated
    depth: int  # of one step of the sum
    splits: int  # programs that share a sum
    group: int  # rows of tiles that programs go through side by side
    warps: int
    stages: int


@lru_cache(1024)
def gemm_launch(rows: int, columns: int, depth: int, gated: bool, splits: bool, processors: int) -> GemmLaunch:
    """Tiles as narrow as keeps the processors busy, six steps of the sum in flight, and split sums if allowed.

    A short sum that may be split is two halves, each one step. depth: of the sum. gated: two products a tile. splits:
    whether the caller can add up.
    """
    if splits and HALF < depth <= 2 * HALF and cdiv(rows, 64) * cdiv(columns, 64) * 2 <= processors:
        return GemmLaunch(64, 64, HALF, 2, 8, 4, 1)
    across = 32 if rows <= 128 or gated else 64
    tiles = cdiv(rows, 128) * cdiv(columns, across)
    most = max(depth // 512, 1) if splits else 1  # a sum no shorter than eight steps a program
    shares = max(min(processors // max(tiles, 1), most, 8), 1)
    return GemmLaunch(128, across, 64, shares, 8, 4 if rows <= 128 else 8, 6)


@lru_cache(1024)
def fixed_launch(rows: int, columns: int, gated: bool, processors: int) -> GemmLaunch:
    """Tiles of which an element's sum does not depend on how many rows there are.

    Their width, which is that of the matrix instruction, follows from the matrix: the widest that keeps the processors
    busy. Their height follows from the rows, as far as it is one or two of the same instruction, side by side. The sum
    is never split, and its steps are one order.
    """
    across = next((n for n in (128, 64) if cdiv(columns, n) >= processors), 32)
    high = 64 if rows <= 64 else 128
    stage = 2 * 64 * (high + across * (2 if gated else 1))  # bytes of 16-bit numbers
    return GemmLaunch(high, across, 64, 1, 8, high // 16, min(6, ROOM // stage))


def described(t: Tensor) -> bool:
    """Whether the tensor memory accelerator reads (rows, columns) as they lie: 16 bytes at a time."""
    return t.stride(-1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def multiply(
    x: Tensor,
    m: Matrix,
    out: Tensor,
    shape: GemmLaunch,
    act: str = "none",
    gated: bool = False,
    residual: Tensor | None = None,
    scale: float = 1.0,
    layer_scale: Tensor | None = None,
) -> None:
    """act(x W^T + bias) into `out` (rows, columns), or float32 (splits, rows, columns) without bias where it is split.

    x and residual (rows, ...) are flat, x and the matrix `described`. Rows of the matrix are [gate | up] where gated.
    """
    rows, depth = x.shape
    columns = m.weight.shape[0] // 2 if gated else m.weight.shape[0]
    tiles = cdiv(rows, shape.rows) * cdiv(columns, shape.columns)
    dot: Any = torch.float32 if interpreted() and x.dtype == torch.bfloat16 else x.dtype
    whole = not gated and cdiv(depth, shape.depth) <= shape.splits
    ahead = rows <= FEW and not whole and m.weight.itemsize == 2 and m.weight.data_ptr() % 16 == 0
    with on(x):
        gemm_tile[(tiles, shape.splits)](
            TensorDescriptor.from_tensor(x, [shape.rows, shape.depth]),
            TensorDescriptor.from_tensor(m.weight, [shape.columns, shape.depth]),
            m.weight,
            m.bias,
            residual,
            layer_scale,
            out,
            rows,
            columns,
            depth,
            m.weight.stride(0),
            0 if residual is None else residual.stride(0),
            scale,
            ACT=act,
            GATED=gated,
            SPLITS=shape.splits,
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            DEPTH=shape.depth,
            GROUP=shape.group,
            PIECES=max(shape.warps * 32 // shape.columns, 1) if ahead else 0,
            WHOLE=whole,
            DOT=getattr(tl, str(dot).removeprefix("torch.")),
            num_warps=shape.warps,
            num_stages=shape.stages,
            **dependent(x.device),
        )
