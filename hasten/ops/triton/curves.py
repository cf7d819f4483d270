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


@triton.jit
def gelu(x):
    """x times the normal distribution's integral, to 3e-7 of 1 + |x| and 2e-6 of its value.

    The integral's tail is exp(-x x / 2) times a polynomial in 1 / (1 + 0.34 |x|), fitted to 2e-7 of its value. That is
    a quarter of what erf costs, which would be seen behind a product, and keeps what 1 + erf cancels left of zero.
    """
    a = tl.minimum(tl.abs(x), 100.0)  # infinity times no share is not a number
    t = 1.0 / (1.0 + 0.34 * a)
    p = 0.2720432480031576 + t * (-0.2047534895959589 + t * 0.045733467689045966)
    p = 0.12862878367388866 + t * (0.16068771705728696 + t * (-0.03848462296044826 + t * p))
    tail = t * (0.13614479474837468 + t * p) * tl.exp(-0.5 * a * a)
    return tl.where(x < 0.0, 0.0, x) - a * tail  # a NaN stays one
