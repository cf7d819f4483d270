"""Convolutions whose windows lie side by side, computed as the products that they are.

That is how an image is cut into patches. cuDNN has no good kernel for it: a ViT-L's takes 0.08 ms for one image and
0.54 ms for 64 on an H100, and then there are the copies that reorder its axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

TENSOR_CORE = frozenset((torch.float16, torch.bfloat16))


class PatchesAsProducts(TorchFunctionMode):
    """Inside, convolutions that cut 16-bit images on a GPU into patches are products; all others are as ever."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d and not kwargs and cuts(*args) and args[0].is_cuda and args[0].dtype in TENSOR_CORE:
            return product(*args[:3])
        return func(*args, **(kwargs or {}))


def cuts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether conv2d with these arguments looks at every pixel of x (batch, channels, height, width) exactly once."""
    window, size = tuple(weight.shape[2:]), tuple(x.shape[2:])
    whole = len(size) == 2 and all(s % w == 0 for s, w in zip(size, window, strict=True))
    return whole and _pair(stride) == window and _pair(padding) == (0, 0) and _pair(dilation) == (1, 1) and groups == 1


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What conv2d, its window for a stride, makes of x (batch, channels, height, width): (batch, out, high, wide)."""
    high, wide = weight.shape[2:]
    batch, channels, height, width = x.shape
    cells = x.view(batch, channels, height // high, high, width // wide, wide).permute(0, 2, 4, 1, 3, 5)
    return F.linear(cells.flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else value
