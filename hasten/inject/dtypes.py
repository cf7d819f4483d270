"""The spellings of a number format that `dtype` accepts: DeepSpeed-Inference's, PyTorch's and the plain ones."""

from __future__ import annotations

import torch

SPELLINGS: dict[torch.dtype, tuple[str, ...]] = {
    torch.float16: ("float16", "fp16", "half", "torch.float16", "torch.half"),
    torch.bfloat16: ("bfloat16", "bf16", "bfloat", "torch.bfloat16"),
    torch.float32: ("float32", "fp32", "float", "torch.float32", "torch.float"),
    torch.int8: ("int8", "torch.int8"),
}

COMPUTE = (torch.float16, torch.bfloat16, torch.float32)
"""The formats that a model can be run in."""

_BY_NAME = {name: dtype for dtype, names in SPELLINGS.items() for name in names}


def read_dtype(value: object) -> torch.dtype:
    """The torch dtype that `value` (a dtype or one of SPELLINGS) stands for; ValueError for anything else."""
    if isinstance(value, torch.dtype) and value in SPELLINGS:
        return value
    if isinstance(value, str) and value in _BY_NAME:
        return _BY_NAME[value]
    raise ValueError(f"a torch dtype or its name, one of {', '.join(_BY_NAME)}")
