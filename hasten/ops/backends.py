"""Which backends this machine can run, and their registration."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch


def _triton_runs() -> bool:
    """Triton 3.4 is the first that launches dependent kernels early and describes tensors for the copy engine."""
    runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and find_spec("triton") is not None and find_spec("triton.tools.tensor_descriptor") is not None


BACKENDS: dict[str, tuple[Callable[[], bool], str]] = {
    "cpu": (lambda: True, "hasten.ops.cpu"),
    "triton": (_triton_runs, "hasten.ops.triton"),
    "cuda": (torch.cuda.is_available, "hasten.ops.cuda"),  # behind Triton, whose kernels take only where they win
}
"""Name: whether it runs here, and the module whose import registers its implementations."""


def load() -> tuple[str, ...]:
    """Register the implementations of every backend that runs here, once, and return the backends' names."""
    names = tuple(name for name, (runs, _) in BACKENDS.items() if runs())
    for name in names:
        import_module(BACKENDS[name][1])
    return names
