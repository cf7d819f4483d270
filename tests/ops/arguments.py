"""What cases are made of: random tensors and layers, copies in another dtype, and the tensors inside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hasten.ops import Matrix, NormLayer
from hasten.spec import Attention, Norm

Maker = Callable[[torch.dtype], tuple[Any, ...]]


def convert(value: Any, dtype: torch.dtype) -> Any:
    """A copy with every floating tensor, however deep, in `dtype`; strides are kept, other values shared."""
    if isinstance(value, Tensor):
        fresh = value.clone()
        if 0 not in value.stride():  # an expanded tensor has too little memory to be copied into
            fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(
                value
            )
        return fresh.to(dtype) if value.is_floating_point() else fresh
    if isinstance(value, tuple | list):
        return type(value)(convert(v, dtype) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        found = {f.name: getattr(value, f.name) for f in fields(value)}
        inside = (Tensor, tuple, list)
        changed = {n: convert(v, dtype) for n, v in found.items() if isinstance(v, inside) or is_dataclass(v)}
        return replace(value, **changed) if changed else value
    return value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of an answer or of arguments, however deep, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, f.name) for f in fields(value)]
    return [t for v in value for t in tensors(v)] if isinstance(value, tuple | list) else []


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def strided(x: Tensor) -> Tensor:
    """Equal values that lie two apart in memory."""
    return x.repeat_interleave(2, -1)[..., ::2]


def matrix(dtype: torch.dtype, *shape: int, bias: bool = True) -> Matrix:
    """Rows of length about one, so that products keep the size of their input."""
    weight = random(*shape, dtype=dtype, scale=shape[-1] ** -0.5)
    return Matrix(weight, random(*shape[:-1], dtype=dtype) if bias else None)


def norm_layer(dtype: torch.dtype, *shape: int, kind: str = "layer", bias: bool = True, **more: Any) -> NormLayer:
    spec = Norm(kind, 1e-5, bias, **more)  # type: ignore[arg-type]
    return NormLayer(spec, random(*shape, dtype=dtype), random(*shape, dtype=dtype) if bias else None)


def attention(heads: int, kv_heads: int, dim: int, **more: Any) -> Attention:
    return Attention(heads, kv_heads, dim, 0.3, True, "qkvo", **more)
