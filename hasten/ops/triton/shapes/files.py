"""The measured launches that lie in this folder, one file for each kind of kernel and device."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

DEVICES = {"H100": "h100", "H200": "h100"}
"""What a device's name contains, and its files: an H200 has the processors of an H100 and faster memory."""


def records(kind: str, device: torch.device) -> tuple[dict[str, Any], ...]:
    """What was measured for kernels of this kind on such a device, or nothing.

    Tensors on the CPU are compiled for inspection, or interpreted, as for an H100.
    """
    return _read(kind, _name(device))


@cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "H100"


@cache
def _read(kind: str, device: str) -> tuple[dict[str, Any], ...]:
    found = next((file for part, file in DEVICES.items() if part in device), None)
    path = Path(__file__).parent / f"{kind}_{found}.json"
    return tuple(json.loads(path.read_text())) if path.exists() else ()
