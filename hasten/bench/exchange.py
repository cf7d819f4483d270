"""Sums over ranks on GPUs: proves the mailbox kernel, then times it beside NCCL.

python -m hasten run --num_gpus 2 --module hasten.bench.exchange
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hasten.errors import ConfigError
from hasten.ops import settle, settle_over
from hasten.ops.backends import load
from hasten.parallel import Group, Processes
from hasten.parallel.symmetric import LIMIT, Symmetric

CALLS = 64  # in a graph: about what a token of a 32-layer model exchanges
DTYPES = torch.bfloat16, torch.float16, torch.float32
BOUNDS = {torch.bfloat16: 4e-2, torch.float16: 4e-3, torch.float32: 1e-5}


def message(rank: int, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What a rank says, which every rank can work out."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + rank)).to(dtype)


def settled(group: Group, y: Tensor, residual: Tensor) -> Tensor:
    return settle_over(y, residual, None, None, 1.0, None, group)


def check(got: Tensor, group: Group, step: int, residual: Tensor) -> None:
    """AssertionError unless the sum is right, to the rounding of its dtype, and every rank has the same bits."""
    shape, dtype = tuple(got.shape), got.dtype
    total = torch.stack([message(r, step, shape, dtype).double() for r in range(group.size)]).sum(0)
    want = settle.reference(total, residual.double().cpu(), None, None, 1.0, None)
    torch.testing.assert_close(got.double().cpu(), want, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])
    first, *rest = group.all_gather(got.flatten()).view(group.size, -1)
    assert all(torch.equal(first, other) for other in rest), f"ranks differ in {shape} of {dtype}"


def prove(group: Symmetric, device: torch.device, steps: int = 300) -> None:
    """Messages of changing lengths and dtypes, launch by launch, then replays of a graph, after each other."""
    shapes = random.Random(0)
    for step in range(steps):
        dtype = shapes.choice(DTYPES)
        most = LIMIT // torch.empty(0, dtype=dtype).element_size()
        shape = (1, shapes.choice((1, 8, 1000, 2048, 4096, most // 2 + 8, most)))
        residual = message(99, step, shape, dtype).to(device)
        check(settled(group, message(group.rank, step, shape, dtype).to(device), residual), group, step, residual)
    y, residual = torch.zeros(3, 4096, device=device), torch.zeros(3, 4096, device=device)
    given, graph = torch.zeros_like(y), torch.cuda.CUDAGraph()
    settled(group, y, residual)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y.copy_(given)
        for _ in range(5):  # summing sums: wrong as soon as one message overtakes another
            y.copy_(settled(group, y, residual) / group.size)
        out = settled(group, given.clone(), residual)
    for step in range(50):
        given.copy_(message(group.rank, step, (3, 4096), torch.float32))
        graph.replay()
        check(out, group, step, residual)
        torch.testing.assert_close(y, out / group.size, atol=1e-5, rtol=1e-5)


def timed(call: Callable[[], object]) -> float:
    """Median microseconds of a call inside a graph of CALLS."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    took = []
    for _ in range(25):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(took[5:])


def main() -> None:
    if not torch.cuda.is_available():
        raise ConfigError("hasten.bench.exchange needs two or more GPUs of one host")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(minutes=1))
    world = dist.group.WORLD
    assert world is not None
    load()
    with torch.no_grad():
        nccl, mailbox = Processes(world), Symmetric(world, device)
        prove(mailbox, device)
        if mailbox.rank == 0:
            print(f"{mailbox.size} x {torch.cuda.get_device_name(device)}: sums are right, and the same on every rank")
            print(
                f"{'rows x width':>14} {'KiB':>5} {'NCCL us':>9} {'mailbox us':>11}   all-reduce and residual, bfloat16"
            )
        for width in (2048, 4096, 8192):
            for rows in (1, 4, 16):
                residual = message(99, 0, (rows, width), torch.bfloat16).to(device)
                y = message(mailbox.rank, 0, (rows, width), torch.bfloat16).to(device)
                us = [timed(lambda g=g, y=y, r=residual: settled(g, y, r)) for g in (nccl, mailbox)]
                if mailbox.rank == 0:
                    shape, size = f"{rows} x {width}", rows * width / 512
                    print(f"{shape:>14} {size:5.0f} {us[0]:9.2f} {us[1]:11.2f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
