"""Functions of one float32 value that Triton does not have, or not without overflow on the way."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """To 4e-7 of its value: a series where the quotient would cancel, near zero."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = tl.minimum(x * x, 0.0625)
    near = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))
