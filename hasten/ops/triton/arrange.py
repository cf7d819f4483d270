"""What every launcher asks of its tensors: are they served, how do they lie, and on how large a device."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))
H100_PROCESSORS = 132


def served(*tensors: Tensor | None) -> bool:
    """Whether all of them are of a dtype that the kernels take, and none wants a gradient, which they do not give."""
    recorded = torch.is_grad_enabled()
    for t in tensors:  # noqa: SIM110 - every launch comes by here, and a generator takes twice as long
        if t is not None and (t.dtype not in FLOATS or (recorded and t.requires_grad)):
            return False
    return True


def cdiv(n: int, size: int) -> int:
    """Pieces of `size` that cover n. Triton's own, which kernels can call too, takes microseconds on the host."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least that is not below n, for n of 1 or more; 0 for 0, as Triton's has it."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def rows(x: Tensor) -> Tensor:
    """x (..., width) as (outer, inner, width) with a contiguous last axis: a view where strides allow, else a copy."""
    x = dense(x)
    if x.dim() < 3:
        return x.view(1, -1, x.shape[-1]) if x.dim() == 1 else x.unsqueeze(0)
    return x.flatten(0, -3)


def dense(x: Tensor) -> Tensor:
    """x with a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; interpreted kernels are launched as on an H100, so that they prove its shapes."""
    if device.type != "cuda":
        return H100_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


ALREADY_THERE = nullcontext()


def on(x: Tensor) -> AbstractContextManager[object]:
    """Inside, x's device is the current one, as it always is where there is no other."""
    return torch.cuda.device_of(x) if _devices() > 1 else ALREADY_THERE


@cache
def _devices() -> int:
    return torch.cuda.device_count()
