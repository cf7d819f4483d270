"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits before it needs it.

A kernel that is launched so calls `go` first, which lets its successor start, loads what no kernel of the chain writes
(weights, tables), and calls `wait` before it touches anything that an earlier kernel wrote or still reads. Every kernel
of the chain waits, even one that reads nothing of its predecessor: the one behind it relies on that. Kernels launched
without it, torch's among them, begin when everything before them has ended, as ever.

PTX ISA, griddepcontrol. The memory clobber keeps the compiler from moving loads and stores across.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from hasten.ops.triton.arrange import interpreted


@triton.jit
def go(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def wait(PDL: tl.constexpr):
    """Until every earlier kernel has ended and its stores are seen."""
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )


@cache
def dependent(device: torch.device) -> dict[str, bool]:
    """Keywords of a launch: PDL for the kernel, and launch_pdl for the launcher where the device can (sm_90 on).

    Tensors on the CPU are compiled for inspection, as for Hopper, or interpreted.
    """
    if interpreted() or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
