"""Products of one row with a matrix, at the speed of memory: everything that surrounds them happens in registers.

A program owns a few rows of the matrix, whole. It loads them before it waits for the kernel that makes x, so that the
stream of weights does not stop between kernels; then it normalises x anew, as every program does, for x lies in the
second-level cache; and it finishes its rows of the answer: bias, activation, gate, residual.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.linear import Matrix, linear
from hasten.ops.norm import NormLayer
from hasten.ops.region import head, project, up
from hasten.ops.triton.act import CURVES, curve, gated_curve
from hasten.ops.triton.arrange import cdiv, on, served
from hasten.ops.triton.curves import tanh
from hasten.ops.triton.gemv_launch import gemv_launch
from hasten.ops.triton.launch import dependent, go, wait
from hasten.ops.triton.settle import vectors
from hasten.spec import Head, Mlp

WIDEST = 32768  # columns: a row in the registers of 16 warps, 64 numbers a thread


@triton.jit
def load_rows(w, n, present, w_row, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows n of a matrix, whole, to be read once: pieces (len(n), BLOCK) in its dtype, zeros where not present."""
    tile = ()
    for first in tl.static_range(0, COLUMNS, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = present[:, None]
        if first + BLOCK > COLUMNS:
            inside = inside & (k < COLUMNS)[None, :]
        at = n.to(tl.int64)[:, None] * w_row + k[None, :]
        tile = tile + (tl.load(w + at, mask=inside, other=0.0, eviction_policy="evict_first"),)
    return tile


@triton.jit
def load_numbers(vector, n, present):
    """vector[n] in float32, zeros where there is no vector."""
    found = tl.zeros((n.shape[0],), tl.float32)
    if vector is not None:
        found = tl.load(vector + n, mask=present, other=0.0).to(tl.float32)
    return found


@triton.jit
def load_row(vector, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """A row of so many numbers, in pieces (BLOCK,) of its dtype, filled up with zeros; no pieces of no vector."""
    row = ()
    if vector is not None:
        for first in tl.static_range(0, COLUMNS, BLOCK):
            k = first + tl.arange(0, BLOCK)
            if first + BLOCK > COLUMNS:
                row = row + (tl.load(vector + k, mask=k < COLUMNS, other=0.0),)
            else:
                row = row + (tl.load(vector + k),)
    return row


@triton.jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def moments(x, row, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and variance of a row in one go, around its first number: it lies at most sqrt(COLUMNS) deviations away."""
    first = tl.load(x).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(len(row)):
        y = row[i].to(tl.float32) - first
        if (i + 1) * BLOCK > COLUMNS:
            y = tl.where(i * BLOCK + tl.arange(0, BLOCK) < COLUMNS, y, 0.0)
        total += y
        squares += y * y
    total, squares = tl.reduce((total, squares), 0, add_pairs)
    ahead = total / COLUMNS
    return first + ahead, tl.maximum(squares / COLUMNS - ahead * ahead, 0.0)


@triton.jit
def products(x, tile, g, b, eps, NORM: tl.constexpr, OFFSET: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows,): rows of a matrix times the normalised x; rms waits for no sum before the product begins."""
    row = load_row(x, COLUMNS, BLOCK)
    mean = 0.0
    factor = 1.0
    if NORM == "layer":
        mean, variance = moments(x, row, COLUMNS, BLOCK)
        factor = tl.math.rsqrt(variance + eps)
    if NORM == "rms":
        squares = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(len(tile)):
            y = row[i].to(tl.float32)
            squares += y * y
        factor = tl.math.rsqrt(tl.sum(squares, 0) / COLUMNS + eps)
    sums = 0.0
    for i in tl.static_range(len(tile)):
        y = row[i].to(tl.float32)
        if NORM != "none":
            weight = g[i].to(tl.float32)
            if OFFSET != 0.0:
                weight += OFFSET
            y = (y - mean) * (weight * factor) if NORM == "layer" else y * weight
            if len(b):
                y = y + b[i].to(tl.float32)
        if i:
            sums += tile[i].to(tl.float32) * y[None, :]
        else:
            sums = tile[i].to(tl.float32) * y[None, :]
    total = tl.sum(sums, 1)
    if NORM == "rms":
        total *= factor
    return total


@triton.jit
def gemv(
    x,
    w,
    bias,
    norm_weight,
    norm_bias,
    residual,
    layer_scale,
    out,
    rows,
    w_row,
    eps,
    scale,
    softcap,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < rows
    if GATED:  # rows of the gate and of up, side by side: one sum serves both
        both = tl.reshape(n[:, None] + tl.arange(0, 2)[None, :] * rows, (2 * ROWS,))
        present = tl.reshape(tl.broadcast_to(inside[:, None], (ROWS, 2)), (2 * ROWS,))
    else:
        both, present = n, inside
    tile = load_rows(w, both, present, w_row, COLUMNS, BLOCK)
    g, b = load_row(norm_weight, COLUMNS, BLOCK), load_row(norm_bias, COLUMNS, BLOCK)
    added = load_numbers(bias, both, present)
    stretch = load_numbers(layer_scale, n, inside)
    wait(PDL)
    kept = load_numbers(residual, n, inside)
    a = products(x, tile, g, b, eps, NORM, OFFSET, COLUMNS, BLOCK) + added
    if GATED:
        a, u = tl.split(tl.reshape(a, (ROWS, 2)))
        a = gated_curve(a, u, ACT)
    elif ACT != "none":
        a = curve(a, ACT)
    if softcap is not None:
        a = softcap * tanh(a / softcap)
    if layer_scale is not None:
        a *= stretch
    if residual is not None:
        a = a * scale + kept
    tl.store(out + n, a.to(out.dtype.element_ty), mask=inside)


def norm_arguments(n: NormLayer | None) -> tuple[Tensor | None, Tensor | None, float, float, str]:
    """Weight, bias, eps, offset and kind of a norm that may be absent."""
    if n is None:
        return None, None, 0.0, 0.0, "none"
    return *vectors(n), n.spec.eps, n.spec.offset, n.spec.kind


def one_row(x: Tensor, m: Matrix, *vectors: Tensor | None) -> bool:
    """Whether x is one row, the matrix's rows are contiguous and of x's dtype, and every vector is dense."""
    if not isinstance(m, Matrix) or m.weight.dim() != 2 or x.dim() == 0 or x.numel() != x.shape[-1] or not x.numel():
        return False
    w = m.weight
    dense = w.stride(1) == 1 and all(v is None or v.is_contiguous() for v in (*vectors, m.bias))
    return dense and w.dtype == x.dtype and 0 < w.shape[1] <= WIDEST and served(x, w, m.bias, *vectors)


def row_norm(n: NormLayer | None) -> bool:
    """Whether a norm is absent or has one dense vector of weights."""
    return n is None or (n.weight.dim() == 1 and served(n.weight, n.bias) and _dense(n.weight) and _dense(n.bias))


def _dense(t: Tensor | None) -> bool:
    return t is None or t.is_contiguous()


def _run(
    x: Tensor,
    m: Matrix,
    before: NormLayer | None = None,
    *,
    act: str = "none",
    gated: bool = False,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    w = m.weight
    rows, columns = w.shape[0] // (2 if gated else 1), w.shape[1]
    out = x.new_empty((*x.shape[:-1], rows))
    weight, bias, eps, offset, kind = norm_arguments(before)
    shape = gemv_launch(rows, columns, w.element_size(), gated, x.device)
    with on(x):
        gemv[(cdiv(rows, shape.rows),)](
            x.contiguous(),
            w,
            m.bias,
            weight,
            bias,
            residual,
            layer_scale,
            out,
            rows,
            w.stride(0),
            eps,
            scale,
            softcap,
            NORM=kind,
            OFFSET=offset,
            ACT=act,
            GATED=gated,
            ROWS=shape.rows,
            COLUMNS=columns,
            BLOCK=shape.block,
            num_warps=shape.warps,
            **dependent(x.device),
        )
    return out


@linear.register("triton", devices="cuda", accepts=one_row)
def _(x: Tensor, m: Matrix) -> Tensor:
    return _run(x, m)


def _accepts_head(x: Tensor, before: NormLayer | None, m: Matrix, h: Head) -> bool:
    return one_row(x, m) and row_norm(before) and h.scale == 1.0


@head.register("triton", devices="cuda", accepts=_accepts_head)
def _(x: Tensor, before: NormLayer | None, m: Matrix, h: Head) -> Tensor:
    return _run(x, m, before, softcap=h.softcap)


def _accepts_up(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> bool:
    known = mlp.act in CURVES or (mlp.gated and mlp.act == "clamped_swiglu")
    return known and one_row(x, m) and row_norm(before)


@up.register("triton", devices="cuda", accepts=_accepts_up)
def _(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> Tensor:
    return _run(x, m, before, act=mlp.act, gated=mlp.gated)


def _accepts_project(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> bool:
    if inner is not None or outer is not None or not one_row(x, m, residual, layer_scale):
        return False
    return residual.dtype == x.dtype and residual.numel() == len(m.weight)


@project.register("triton", devices="cuda", accepts=_accepts_project)
def _(
    x: Tensor,
    m: Matrix,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
) -> Tensor:
    return _run(x, m, residual=residual, layer_scale=layer_scale, scale=scale)
