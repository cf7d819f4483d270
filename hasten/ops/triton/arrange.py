"""What every launcher asks of its tensors: are they served, how do they lie, and on how large a device."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))
H100_PROCESSORS = 132


def served(*tensors: Tensor | None) -> bool:
    """Whether all of them are of a dtype that the kernels take, and none wants a gradient, which they do not give."""
    present = [t for t in tensors if t is not None]
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in present)
    return not tracked and all(t.dtype in FLOATS for t in present)


def rows(x: Tensor) -> Tensor:
    """x (..., width) as (outer, inner, width) with a contiguous last axis: a view where strides allow, else a copy."""
    x = dense(x)
    if x.dim() < 3:
        return x.view(1, -1, x.shape[-1]) if x.dim() == 1 else x.unsqueeze(0)
    return x.flatten(0, -3)


def dense(x: Tensor) -> Tensor:
    """x with a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; interpreted kernels are launched as on an H100, so that they prove its shapes."""
    if device.type != "cuda":
        return H100_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
