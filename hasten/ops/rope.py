"""Rotary position embedding (arXiv 2104.09864) and the ways to stretch it over more positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hasten.ops.table import op_by_rows
from hasten.spec import Dynamic, Linear, Llama3, LongRope, Rope, Yarn


@op_by_rows
def rope(x: Tensor, cos: Tensor, sin: Tensor, r: Rope) -> Tensor:
    """Rotate the first `r.dim` of each head. x (..., heads, head_dim); cos, sin (..., dim / 2) for the same tokens."""
    wide = torch.promote_types(x.dtype, cos.dtype)
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    turning, still = x[..., : r.dim].to(wide), x[..., r.dim :]
    if r.pairing == "halves":
        a, b = turning.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned.to(x.dtype), still), -1)


def rope_table(r: Rope, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (..., dim / 2), of integer positions (...) in a sequence of `length` tokens so far."""
    rates, magnitude = rope_rates(r, length)
    angle = positions.unsqueeze(-1).float() * rates.to(positions.device)
    return angle.cos() * magnitude, angle.sin() * magnitude


def rope_rates(r: Rope, length: int) -> tuple[Tensor, float]:
    """Radians per position of each pair, float32 (dim / 2,), and what multiplies cos and sin."""
    plain = _rates(r.dim, r.theta)
    match r.scaling:
        case None:
            return plain, 1.0
        case Linear(factor):
            return plain / factor, 1.0
        case Dynamic(factor, original):
            if length <= original:
                return plain, 1.0
            stretch = (factor * length / original - (factor - 1)) ** (r.dim / (r.dim - 2))
            return _rates(r.dim, r.theta * stretch), 1.0
        case Llama3():
            return _llama3(plain, r.scaling), 1.0
        case Yarn():
            return _yarn(plain, r, r.scaling), r.scaling.magnitude
        case LongRope(short, long, original, magnitude):
            return plain / torch.tensor(long if length > original else short, dtype=torch.float32), magnitude


def _rates(dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _llama3(plain: Tensor, s: Llama3) -> Tensor:
    wavelength = 2 * math.pi / plain
    blend = ((s.original / wavelength - s.low) / (s.high - s.low)).clamp(0, 1)
    return (1 - blend) * plain / s.factor + blend * plain


def _yarn(plain: Tensor, r: Rope, s: Yarn) -> Tensor:
    def dimension(rotations: float) -> float:
        return r.dim * math.log(s.original / (rotations * 2 * math.pi)) / (2 * math.log(r.theta))

    first, last = dimension(s.fast), dimension(s.slow)
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, r.dim - 1)
    ramp = ((torch.arange(r.dim // 2, dtype=torch.float32) - first) / max(last - first, 0.001)).clamp(0, 1)
    return plain / s.factor * ramp + plain * (1 - ramp)
