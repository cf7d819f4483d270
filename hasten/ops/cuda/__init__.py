"""Implementations on CUDA out of torch's own kernels: cuBLAS for products, cuDNN and FlashAttention for attention.

Importing this package registers them; it needs no GPU for that.
"""

from hasten.ops.cuda import attention, linear, region

__all__ = ["attention", "linear", "region"]
