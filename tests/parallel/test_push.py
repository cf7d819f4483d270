"""The kernel that sums over ranks through a mailbox, interpreted in processes that share memory."""

from __future__ import annotations

import os
import subprocess
import sys
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hasten.ops import NormLayer, settle, settle_over, use
from hasten.ops.backends import load
from hasten.parallel import Processes
from hasten.parallel.symmetric import LIMIT, PIECE, Mailbox, Symmetric, boxes, closest, mailbox
from hasten.spec import Norm
from tests.parallel import ranks

on_cpu = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter runs on a CPU")


class Shared(Symmetric):
    """Processes on a CPU, whose mailboxes are files that all of them map."""

    def __init__(self, folder: str) -> None:
        world = dist.group.WORLD
        assert world is not None
        Processes.__init__(self, world)
        load()
        length = prod(boxes(self.size))
        files = [
            torch.from_file(f"{folder}/{r}", shared=True, size=length, dtype=torch.int64) for r in range(self.size)
        ]
        dist.barrier()
        self.files, self.mailbox = files, mailbox(self.rank, [f.data_ptr() for f in files], files[self.rank])


def message(rank: int, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


SHAPES = (1, 33), (1, 1, 2048), (2, 3, 700)


def around(width: int, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """What settles a sum: inner norm, outer norm, scale, layer scale."""
    n = NormLayer(Norm("rms", 1e-5), torch.randn(width).to(dtype))
    return [(None, None, 1.0, None), (None, None, 0.3, torch.randn(width).to(dtype)), (n, n, 0.5, None)]


def settled(folder: str, dtype: torch.dtype) -> list[Tensor]:
    """Messages of changing lengths, each settled in three ways."""
    group, made = Shared(folder), []
    for step, shape in enumerate(2 * SHAPES):
        residual = message(99, step, shape, dtype)
        torch.manual_seed(step)
        for inner, outer, scale, own in around(shape[-1], dtype):
            y = message(group.rank, step, shape, dtype)
            with use("triton"):
                made.append(settle_over(y, residual, inner, outer, scale, own, group))
    return made


@on_cpu
@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (2, torch.float16), (4, torch.bfloat16)])
def test_every_rank_gets_the_same_bits_of_the_sum(size: int, dtype: torch.dtype, tmp_path: Any) -> None:
    heard = ranks.run(size, settled, str(tmp_path), dtype)
    k = 0
    for step, shape in enumerate(2 * SHAPES):
        total_ = torch.stack([message(r, step, shape, dtype).double() for r in range(size)]).sum(0)
        torch.manual_seed(step)
        for inner, outer, scale, own in around(shape[-1], dtype):
            want = settle.reference(total_, message(99, step, shape, dtype).double(), inner, outer, scale, own)
            for other in heard:
                assert torch.equal(other[k], heard[0][k])
            bound = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
            torch.testing.assert_close(heard[0][k].double(), want, atol=bound, rtol=bound)
            k += 1
    assert k == len(heard[0])


def counted(folder: str) -> tuple[list[int], bool]:
    """How often regions were used, from just before the count wraps around, and whether all sums were right."""
    group = Shared(folder)
    box: Mailbox = group.mailbox
    start = 2**31 - 2
    box.calls.fill_(start)
    good = True
    for step in range(5):
        y = message(group.rank, step, (1, PIECE + 2), torch.float32)  # two pieces
        residual = torch.zeros_like(y)
        with use("triton"):
            got = settle_over(y, residual, None, None, 1.0, None, group)
        good &= torch.allclose(
            got, message(0, step, (1, PIECE + 2), y.dtype) + message(1, step, (1, PIECE + 2), y.dtype)
        )
    return (box.calls[:3] - start).tolist(), good


@on_cpu
def test_counting_goes_on_where_numbers_wrap_around(tmp_path: Any) -> None:
    for used, good in ranks.run(2, counted, str(tmp_path)):
        assert good
        assert used == [5, 5, 0]


def refused(folder: str) -> list[bool]:
    group = Shared(folder)
    accepts = next(i.accepts for i in settle_over.implementations if i.backend == "triton")

    def taken(elements: int, dtype: torch.dtype, g: Any = group) -> bool:
        y = torch.empty(1, elements, dtype=dtype)
        return accepts(y, y, None, None, 1.0, None, g)

    return [
        taken(LIMIT // 4, torch.float32),
        taken(LIMIT // 4 + 1, torch.float32),
        taken(LIMIT // 2, torch.bfloat16),
        taken(8, torch.float64),
        taken(8, torch.float32, Processes(group.group)),
    ]


@on_cpu
def test_what_does_not_fit_and_groups_without_a_mailbox_are_left_to_others(tmp_path: Any) -> None:
    assert ranks.run(2, refused, str(tmp_path)) == [[True, False, True, False, False]] * 2


@pytest.mark.multigpu
def test_sums_are_right_on_gpus() -> None:
    command = [sys.executable, "-m", "hasten", "run", "--num_gpus", "2", "--module", "hasten.bench.exchange"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "sums are right, and the same on every rank" in done.stdout


def closest_here() -> str:
    world = dist.group.WORLD
    assert world is not None
    return type(closest(world, torch.device("cpu"))).__name__


def test_processes_without_gpus_have_no_mailbox() -> None:
    assert ranks.run(2, closest_here) == ["Processes", "Processes"]
