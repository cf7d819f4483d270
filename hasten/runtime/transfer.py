"""Numbers between the host and a device, without waiting for what the device has still to do."""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the host, uninitialised, that copies to and from the device need not wait for."""
    return torch.empty(*shape, dtype=dtype, pin_memory=device.type == "cuda")


def bytes_of(t: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, to be written while the tensor lives.

    torch's own copies and fills wake its threads from 32,768 elements on, which takes milliseconds on a busy machine.
    """
    return memoryview((ctypes.c_char * t.nbytes).from_address(t.data_ptr())).cast("B")


def numbers(start: int, stop: int) -> array[int]:
    """start to stop - 1 as int64, not made one by one."""
    return _first(1 << stop.bit_length())[start:stop]


@cache
def _first(count: int) -> array[int]:
    return array("q", range(count))


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers on the device, (values,)."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class Moment:
    """A point in a device's work, which the host can wait for; where the host does the work, a point in time."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds of the device's work between the two, both of which have passed."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) * 1e-3


class Download:
    """Copies of tensors on their way to the host, as they are when the device gets here."""

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        self._copies = [host(t.shape, t.dtype, device).copy_(t, non_blocking=True) for t in tensors]
        self.end = Moment(device)

    def tensors(self) -> list[Tensor]:
        """The copies, once they are there."""
        self.end.wait()
        return self._copies
