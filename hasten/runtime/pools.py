"""The memory behind pages: two tensors a layer, which grow with what is asked of them, up to a limit."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from hasten.errors import RequestError
from hasten.spec import Tower

SHARE = 0.5
"""Of the memory that is free at the start, what keys and values may take where nobody says."""

START = 2048
"""Pages that `reserve` begins with where an eighth of the limit allows: growing later moves them all."""

CGROUP = Path("/sys/fs/cgroup")


class Pools:
    """Keys and values of every layer, each (pages, page size, kv_heads, head_dim). `limit`: pages in `memory` bytes."""

    def __init__(self, t: Tower, page_size: int, dtype: torch.dtype, device: torch.device, memory: int) -> None:
        self.page_size, self.memory = page_size, memory
        self.page_bytes = page_bytes(t, page_size, dtype)
        self.limit = memory // self.page_bytes
        if self.limit < 1:
            need = f"one page of {page_size} tokens needs {self.page_bytes} bytes"
            raise RequestError(f"{need}; the memory limit is {memory}")
        heads = [(b.attention.kv_heads, b.attention.head_dim) for b in t.blocks]
        empty = [torch.empty(0, page_size, *shape, dtype=dtype, device=device) for shape in heads]
        self.layers = [(pool, pool.clone()) for pool in empty]

    @property
    def pages(self) -> int:
        """How many there are now."""
        return self.layers[-1][0].shape[0]  # they grow in order

    @property
    def bytes(self) -> int:
        return sum(pool.nbytes for layer in self.layers for pool in layer)

    def hold(self, pages: int) -> None:
        """Have at least so many pages: twice as many as before where the limit allows, with what was in them."""
        assert pages <= self.limit, "the scheduler knows the limit"
        if pages <= self.pages:
            return
        self._grow(min(max(pages, 2 * self.pages), self.limit))

    def reserve(self, pages: int) -> int:
        """Have so many pages, or as many as the limit and the device's memory allow; how many there are then."""
        goal = min(pages, self.limit)
        count = min(max(goal, 2 * self.pages, min(self.limit // 8, START)), self.limit)
        while self.pages < goal:
            try:
                self._grow(count)
            except torch.OutOfMemoryError:
                goal = min(goal, count - 1)
            count = (self.pages + goal + 1) // 2
        return self.pages

    def _grow(self, count: int) -> None:
        for i, (keys, values) in enumerate(self.layers):  # one layer at a time has both sizes
            if len(keys) < count:
                self.layers[i] = _grown(keys, count), _grown(values, count)

    def clear(self) -> None:
        """Give the memory back; the contents are lost."""
        self.layers = [(keys[:0].clone(), values[:0].clone()) for keys, values in self.layers]


def page_bytes(t: Tower, page_size: int, dtype: torch.dtype) -> int:
    """What keys and values of so many tokens take, over all layers."""
    return page_size * t.kv_width * dtype.itemsize


def _grown(pool: Tensor, pages: int) -> Tensor:
    larger = pool.new_empty(pages, *pool.shape[1:])
    larger[: len(pool)] = pool
    return larger


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on the device now."""
    if device.type == "cpu":
        return int(min(_machine_memory(), _group_memory(CGROUP)))
    module = torch.get_device_module(device)
    return module.mem_get_info(device)[0]


def _machine_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes = dict(line.split(":", 1) for line in lines)
    return 1024 * int(sizes["MemAvailable"].split()[0])


def _group_memory(root: Path) -> float:
    """What the control group leaves (cgroup v2), infinite where there is none."""
    try:
        most, now = ((root / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else max(int(most) - int(now), 0)
