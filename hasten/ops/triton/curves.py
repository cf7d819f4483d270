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
    """x times the normal distribution's integral, to 6e-7 of 1 + |x| and 9e-6 of its value down to -6.5.

    The integral's tail is two to the power of a polynomial, fitted to its logarithm: no quotient and no erf, which
    behind a product of thousands of rows would be seen. Below -6.5 it stays what it is there, 4e-11.
    """
    a = tl.minimum(tl.abs(x), 6.5)
    p = 5.993729428155348e-05 + a * -1.7578048527866486e-06
    p = -0.0009163701324723661 + a * p
    p = 0.00844742264598608 + a * p
    p = -0.05382460728287697 + a * p
    p = -0.45861557126045227 + a * p
    p = -1.1511802673339844 + a * p
    p = -1.0000038146972656 + a * p
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.math.exp2(p)  # a NaN stays one
