"""A row or a few through the compiled kernels: the product with what stands before and behind it, in one call.

A token passes here fifty times, so whether a call is served is asked in the cheapest order.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hasten.ops.cpu.library import Library, load
from hasten.ops.linear import Matrix, linear
from hasten.ops.norm import NormLayer
from hasten.ops.pages import Slots
from hasten.ops.region import head, heads, project, qkv, up
from hasten.spec import Attention, Head, Mlp

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NORMS = {"layer": 1, "rms": 2}
ACTS = {"relu": 1, "relu2": 2, "gelu": 3, "gelu_tanh": 4, "quick_gelu": 5, "silu": 6, "tanh": 7}
MOST = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 16}
"""Rows of x up to which these kernels were measured to be the fastest."""
PLAIN = (0, None, None, 0.0, 0.0)  # no norm


def few(x: Tensor, m: Matrix) -> bool:
    """Whether x is a row or a few in the dtype of a matrix whose rows lie in one piece, and nobody wants a gradient."""
    if x.dtype not in MOST or type(m) is not Matrix:
        return False
    w, b = m.weight, m.bias
    if w.dtype != x.dtype or not 0 < x.numel() <= MOST[x.dtype] * x.shape[-1] or w.dim() != 2 or w.stride(1) != 1:
        return False
    if b is not None and (b.dtype != x.dtype or b.stride(0) != 1):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or w.requires_grad))


def vectors(n: NormLayer | None, x: Tensor) -> bool:
    """Whether one weight, and perhaps a bias, in x's dtype serve every row; or there is no norm."""
    if n is None:
        return True
    w, b = n.weight, n.bias
    return (
        w.dim() == 1
        and w.dtype == x.dtype
        and w.stride(0) == 1
        and (b is None or (b.dtype == x.dtype and b.stride(0) == 1))
    )


_asked = os.environ.get("HASTEN_NUM_THREADS", "")
THREADS = int(_asked) if _asked.isdecimal() else 0


def threads() -> int:
    """How many share a call: HASTEN_NUM_THREADS, or as many as torch has."""
    return THREADS or torch.get_num_threads()


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def multiply(
    native: Library,
    x: Tensor,
    m: Matrix,
    before: NormLayer | None = None,
    act: int = 0,
    gated: bool = False,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """act([norm] x W^T + b), or residual + scale (x W^T + b), in x's dtype and leading shape."""
    w, shape = m.weight, x.shape
    rows, columns = w.shape
    x = x if x.dim() == 2 else x.reshape(-1, columns)
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty((*shape[:-1], rows // 2 if gated else rows))
    norm = PLAIN
    if before is not None:
        n = before.spec
        norm = NORMS[n.kind], before.weight.data_ptr(), address(before.bias), n.eps, n.offset
    failed = native.product(
        native.level,
        threads(),
        NUMBERS[x.dtype],
        *(x.shape[0], rows, columns),
        *(x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0), address(m.bias), y.data_ptr()),
        *norm,
        *(act, gated, address(residual), 0 if residual is None else residual.shape[-1], scale),
    )
    if failed:
        raise MemoryError(f"no memory for {tuple(shape)} as float32")
    return y


def register(native: Library) -> None:
    """Put the kernels in front of what the table has already."""

    @linear.register("native", devices="cpu", accepts=few)
    def _(x: Tensor, m: Matrix) -> Tensor:
        return multiply(native, x, m)

    def plain_qkv(x: Tensor, before: NormLayer | None, m: Matrix, *rest: object) -> bool:
        return few(x, m) and vectors(before, x)

    @qkv.register("native", devices="cpu", accepts=plain_qkv)
    def _(
        x: Tensor,
        before: NormLayer | None,
        m: Matrix,
        a: Attention,
        q_norm: NormLayer | None,
        k_norm: NormLayer | None,
        turn: tuple[Tensor, Tensor] | None,
        into: Slots | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return heads(multiply(native, x, m, before), a, q_norm, k_norm, turn, into)

    def plain_up(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> bool:
        return few(x, m) and mlp.act in ACTS and vectors(before, x)

    @up.register("native", devices="cpu", accepts=plain_up)
    def _(x: Tensor, before: NormLayer | None, m: Matrix, mlp: Mlp) -> Tensor:
        return multiply(native, x, m, before, ACTS[mlp.act], mlp.gated)

    def plain_project(
        x: Tensor,
        m: Matrix,
        residual: Tensor,
        inner: NormLayer | None,
        outer: NormLayer | None,
        scale: float,
        layer_scale: Tensor | None,
    ) -> bool:
        return (
            inner is None
            and outer is None
            and layer_scale is None
            and few(x, m)
            and residual.dtype == x.dtype
            and residual.is_contiguous()
            and residual.shape[:-1] == x.shape[:-1]
        )

    @project.register("native", devices="cpu", accepts=plain_project)
    def _(
        x: Tensor,
        m: Matrix,
        residual: Tensor,
        inner: NormLayer | None,
        outer: NormLayer | None,
        scale: float,
        layer_scale: Tensor | None,
    ) -> Tensor:
        return multiply(native, x, m, residual=residual, scale=scale)

    def plain_head(x: Tensor, before: NormLayer | None, m: Matrix, h: Head) -> bool:
        return h.scale == 1.0 and h.softcap is None and few(x, m) and vectors(before, x)

    @head.register("native", devices="cpu", accepts=plain_head)
    def _(x: Tensor, before: NormLayer | None, m: Matrix, h: Head) -> Tensor:
        return multiply(native, x, m, before)


if isinstance(found := load(), Library):
    register(found)
