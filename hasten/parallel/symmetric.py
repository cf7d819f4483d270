"""Memory on every rank's GPU that all ranks can write: a mailbox for sums of small tensors.

A rank puts its numbers into every other rank's mailbox, and adds up what lies in its own: one trip over NVLink, where a
general all-reduce takes several (the one-shot algorithm; ops/triton/push.py has the kernel). Peer to peer stores only:
no multicast, which is switched off while ranks find each other's memory.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hasten.parallel.group import Processes

LIMIT = 2**20  # bytes of a message; above it, what moves memory in bulk is faster
PIECE = 128  # words of 32 bits that travel together
MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


@dataclass(frozen=True, slots=True, eq=False)
class Mailbox:
    """Where ranks leave messages for each other.

    memory (2, size, LIMIT / 4) int64: this rank's boxes, two for each rank, which take turns: a word of 32 bits, and
    above it the number of the call. addresses (size,) int64: each rank's memory, as this process reaches it. calls
    (pieces,) int32: the number of each piece's next call.
    """

    rank: int
    size: int
    addresses: Tensor
    calls: Tensor
    memory: Tensor


def boxes(size: int) -> tuple[int, int, int]:
    """Of each rank's memory."""
    return 2, size, LIMIT // 4


def mailbox(rank: int, addresses: list[int], memory: Tensor) -> Mailbox:
    """A mailbox over memory (`boxes`) int64 of zeros on every rank."""
    where = memory.device
    calls = torch.ones(LIMIT // 4 // PIECE, dtype=torch.int32, device=where)  # no call has the number of an empty box
    return Mailbox(rank, len(addresses), torch.tensor(addresses, device=where), calls, memory)


class Symmetric(Processes):
    """Processes whose GPUs reach each other's memory, on one host; made by all of them together.

    Sums inside a block go through the mailbox if they fit, everything else through torch.distributed. RuntimeError,
    which is torch's, where GPUs do not reach each other.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        super().__init__(group)
        with _without_multicast():
            memory = symmetric.empty(*boxes(self.size), dtype=torch.int64, device=device).zero_()
            torch.cuda.synchronize(device)
            self.handle = symmetric.rendezvous(memory, group)  # keeps the others' memory mapped
        blocks = self.handle.buffer_ptrs  # torch may have put the tensor anywhere in its block
        offsets: list[int] = [0] * self.size
        dist.all_gather_object(offsets, memory.data_ptr() - blocks[self.rank], group=group)
        addresses = [block + offset for block, offset in zip(blocks, offsets, strict=True)]
        self.mailbox = mailbox(self.rank, addresses, memory)
        dist.barrier(group)  # nobody writes before everybody has written zeros


def closest(group: dist.ProcessGroup, device: torch.device) -> Processes:
    """The processes with a mailbox, where their GPUs are on one host and reach each other; a call of all of them."""
    hosts = [""] * dist.get_world_size(group)
    dist.all_gather_object(hosts, socket.gethostname() if device.type == "cuda" else "", group=group)
    if len(set(hosts)) > 1 or not hosts[0]:
        return Processes(group)
    made: Processes | None = None
    with suppress(RuntimeError):
        made = Symmetric(group, device)
    well = [False] * len(hosts)
    dist.all_gather_object(well, made is not None, group=group)
    return made if made is not None and all(well) else Processes(group)


@contextmanager
def _without_multicast() -> Iterator[None]:
    before = os.environ.get(MULTICAST)
    os.environ[MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[MULTICAST]
        else:
            os.environ[MULTICAST] = before
