"""Activations, gated and plain, in float32 whatever the dtype."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.act import act, gated
from hasten.ops.triton.arrange import cdiv, dense, on, power_of_2, served
from hasten.ops.triton.curves import gelu, sigmoid, tanh
from hasten.ops.triton.launch import dependent, go, wait

CURVES = frozenset(("relu", "relu2", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh"))


@triton.jit
def curve(x, KIND: tl.constexpr):
    """One of CURVES, of float32 values."""
    if KIND == "relu":
        y = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    elif KIND == "relu2":
        y = tl.where(x < 0.0, 0.0, x * x)
    elif KIND == "gelu":
        y = gelu(x)
    elif KIND == "gelu_tanh":
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 1 + tanh(u) = 2 sigmoid(2 u)
    elif KIND == "quick_gelu":
        y = x * sigmoid(1.702 * x)
    elif KIND == "silu":
        y = x * sigmoid(x)
    else:
        tl.static_assert(KIND == "tanh")
        y = tanh(x)
    return y


@triton.jit
def gated_curve(gate, up, KIND: tl.constexpr):
    """One of CURVES of the gate, or GPT-OSS's `clamped_swiglu`, times the other half; of float32 values."""
    if KIND == "clamped_swiglu":
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        y = curve(gate, "quick_gelu") * (up + 1.0)
    else:
        y = curve(gate, KIND) * up
    return y


@triton.jit
def activate(x, out, width, x_row, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    go(PDL)
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    wait(PDL)
    y = tl.load(x + row * x_row + i, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x + row * x_row + width + i, mask=inside, other=0.0).to(tl.float32)
        y = gated_curve(y, up, KIND)
    else:
        y = curve(y, KIND)
    tl.store(out + row * width + i, y.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class ActLaunch:
    block: int
    warps: int


@lru_cache(1024)
def act_launch(width: int) -> ActLaunch:
    """Sixteen elements a thread: two 16-byte loads of 16-bit numbers, four of float32."""
    block = min(max(power_of_2(width), 128), 2048)
    return ActLaunch(block=block, warps=max(block // 512, 1))


def _run(x: Tensor, kind: str, width: int) -> Tensor:
    out = x.new_empty((*x.shape[:-1], width))
    if not out.numel():
        return out
    flat = dense(x).flatten(0, -2) if x.dim() > 1 else dense(x).unsqueeze(0)
    shape = act_launch(width)
    with on(x):
        activate[(len(flat) * cdiv(width, shape.block),)](
            flat,
            out,
            width,
            flat.stride(0),
            KIND=kind,
            GATED=width != x.shape[-1],
            BLOCK=shape.block,
            num_warps=shape.warps,
            **dependent(x.device),
        )
    return out


def _accepts(x: Tensor, kind: str) -> bool:
    return x.dim() > 0 and kind in CURVES and served(x)


@act.register("triton", devices="cuda", accepts=_accepts, invariant=True)
def _(x: Tensor, kind: str) -> Tensor:
    return _run(x, kind, x.shape[-1])


def _accepts_gated(x: Tensor, kind: str) -> bool:
    known = kind in CURVES or kind == "clamped_swiglu"
    return x.dim() > 0 and x.shape[-1] % 2 == 0 and known and served(x)


@gated.register("triton", devices="cuda", accepts=_accepts_gated, invariant=True)
def _(x: Tensor, kind: str) -> Tensor:
    return _run(x, kind, x.shape[-1] // 2)
