"""Implementations on the CPU: kernels of our own where they could be compiled, then torch's, each where it was
measured to be faster than the reference.

Importing this package registers them.
"""

from hasten.ops.cpu import native, native_pages, native_sample  # isort: skip -- in front of torch's
from hasten.ops.cpu import attention, linear, moe, norm, pages, region

__all__ = ["attention", "linear", "moe", "native", "native_pages", "native_sample", "norm", "pages", "region"]
