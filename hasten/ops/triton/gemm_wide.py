"""Products of thousands of rows: one program a processor, or two, that works through tiles with loads always ahead.

Tiles come through the tensor memory accelerator, which needs no registers for addresses and fills what lies beyond the
end with zeros. The loop over tiles and the loop over a sum are one, so the next tile's loads are under way while a tile
is finished: biased, activated, added to the residual. Half of its columns at a time fits into registers.
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
from hasten.ops.triton.act import curve
from hasten.ops.triton.arrange import cdiv, interpreted, on
from hasten.ops.triton.launch import dependent, go, wait


@triton.jit
def halves(y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of (ROWS, COLUMNS)."""
    return tl.split(tl.permute(tl.reshape(y, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def biased(y, bias, n, stop):
    if bias is not None:
        y += tl.load(bias + n, mask=n < stop, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=("rows",))
def gemm_tiles(
    x,
    w,
    bias,
    residual,
    layer_scale,
    out,
    rows,
    columns,
    depth,
    scale,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """x, w, residual and out are descriptors of matrices; a tile of `out` and `residual` is half as wide as COLUMNS."""
    go(PDL)
    wait(PDL)
    HALF: tl.constexpr = COLUMNS // 2
    down, across, steps = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), tl.cdiv(depth, DEPTH)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        # in groups of GROUP rows of tiles, so that programs that run together share what they read
        group = tile // (GROUP * across)
        high = tl.minimum(down - group * GROUP, GROUP)
        within = tile % (GROUP * across)
        top, left = (group * GROUP + within % high) * ROWS, within // high * COLUMNS
        y = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(steps):
            a, b = x.load([top, step * DEPTH]), w.load([left, step * DEPTH])
            y = tl.dot(a.to(DOT), b.to(DOT).T, y, input_precision="ieee")
        parts = halves(y, ROWS, COLUMNS)
        for i in tl.static_range(2):
            n = left + i * HALF + tl.arange(0, HALF)
            z = biased(parts[i], bias, n, columns)
            if ACT != "none":
                z = curve(z, ACT)
            if layer_scale is not None:
                z *= tl.load(layer_scale + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
            if residual is not None:
                z = z * scale + residual.load([top, left + i * HALF]).to(tl.float32)
            out.store([top, left + i * HALF], z.to(out.dtype))


@dataclass(frozen=True, slots=True)
class WideLaunch:
    rows: int  # of a tile
    columns: int  # of a tile
    depth: int  # of one step of the sum
    group: int  # rows of tiles that programs go through side by side
    programs: int
    warps: int
    stages: int


@lru_cache(1024)
def wide_launch(rows: int, columns: int, processors: int) -> WideLaunch | None:
    """Tiles of 128 x 256, which read least for what they compute; None where they would leave processors idle."""
    tiles = cdiv(rows, 128) * cdiv(columns, 256)
    if tiles < 0.85 * cdiv(tiles, processors) * processors:
        return None
    return WideLaunch(128, 256, 64, 8, processors, 8, 3)


def multiply_wide(
    x: Tensor,
    m: Matrix,
    out: Tensor,
    shape: WideLaunch,
    act: str = "none",
    residual: Tensor | None = None,
    scale: float = 1.0,
    layer_scale: Tensor | None = None,
) -> None:
    """scale * layer_scale * act(x W^T + bias) + residual into `out`, as gemm.py's `multiply` does it, never split."""
    tile = [shape.rows, shape.columns // 2]

    def described_as(t: Tensor | None, block: list[int]) -> Any:
        return None if t is None else TensorDescriptor.from_tensor(t, block)

    dot: Any = torch.float32 if interpreted() and x.dtype == torch.bfloat16 else x.dtype
    with on(x):
        gemm_tiles[(shape.programs,)](
            described_as(x, [shape.rows, shape.depth]),
            described_as(m.weight, [shape.columns, shape.depth]),
            m.bias,
            described_as(residual, tile),
            layer_scale,
            described_as(out, tile),
            *out.shape,
            x.shape[1],
            scale,
            ACT=act,
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            DEPTH=shape.depth,
            GROUP=shape.group,
            DOT=getattr(tl, str(dot).removeprefix("torch.")),
            num_warps=shape.warps,
            num_stages=shape.stages,
            **dependent(x.device),
        )
