"""Real processes in one gloo group, started once for all tests, that run a function each when asked to.

    answers = run(2, function, "gpt2")  # function("gpt2") on both ranks, at once

The function is one that can be imported; its arguments and answers can be pickled. A rank reads who it is from the
group of torch.distributed that it is in, or from RANK, LOCAL_RANK and WORLD_SIZE.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import pickle
import random
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds for the other ranks, once one has raised
START = 120.0  # seconds more for the first call, which waits for processes and imports

_pools: dict[int, Pool] = {}


class RankError(Exception):
    """Ranks that raised, with their tracebacks, or that gave no answer, with where they stood."""


def run(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """What function(*args) gives on each of `size` ranks, seeded alike; RankError if one raises or takes too long."""
    if size not in _pools:
        _pools[size], timeout = Pool(size), timeout + START
    try:
        return _pools[size].run(function, args, timeout)
    finally:
        if _pools[size].broken:  # ranks may wait for each other forever
            _pools.pop(size).close()


@atexit.register
def _close() -> None:
    while _pools:
        _pools.popitem()[1].close()


class Pool:
    def __init__(self, size: int) -> None:
        context = get_context("forkserver")  # one process imports, all ranks are its forks
        context.set_forkserver_preload(["torch.distributed", "transformers", "hasten.inject.attach", "tests.tiny"])
        self.folder, self.broken = Path(tempfile.mkdtemp(prefix="ranks")), False
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        port = free_port()
        for rank in range(size):
            ours, theirs = context.Pipe()
            work = (theirs, rank, size, self.folder, port)
            process = context.Process(target=_serve, args=work, daemon=True)  # pyright: ignore[reportAttributeAccessIssue]
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        end = time.monotonic() + timeout
        while len(answers) + len(errors) < len(self.pipes) and (left := end - time.monotonic()) > 0:
            waiting = [p for rank, p in enumerate(self.pipes) if rank not in answers and rank not in errors]
            for pipe in wait(waiting, left):
                rank = self.pipes.index(pipe)  # pyright: ignore[reportArgumentType]
                self._hear(rank, answers, errors)
                if rank in errors:
                    end = min(end, time.monotonic() + GRACE)
        silent = [r for r in range(len(self.pipes)) if r not in answers and r not in errors]
        self.broken |= bool(silent)
        errors |= {r: f"no answer after {timeout:.0f} s\n{self._stand(r)}" for r in silent}
        if errors:
            raise RankError("\n".join(f"rank {r} of {len(self.pipes)}: {said}" for r, said in sorted(errors.items())))
        return [answers[r] for r in range(len(self.pipes))]

    def _hear(self, rank: int, answers: dict[int, Any], errors: dict[int, str]) -> None:
        try:
            good, value = pickle.loads(self.pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(GRACE)
            good, value, self.broken = False, f"ended with exit code {self.processes[rank].exitcode}", True
        (answers if good else errors)[rank] = value

    def _stand(self, rank: int) -> str:
        """Where a rank's threads are."""
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2)
        return (self.folder / f"stack.{rank}").read_text()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # a rank that waits for work ends
        for process in self.processes:
            process.join(0 if self.broken else GRACE)
            process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def free_port() -> int:
    """A port that nobody listens on, outside the range from which systems give connections their own."""
    while True:
        with socket.socket() as s:
            port = random.SystemRandom().randrange(10_000, 30_000)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _serve(pipe: Connection, rank: int, size: int, folder: Path, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(folder / f"stack.{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, stack)
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = torch.distributed.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))
        while True:
            try:
                function, args = pickle.loads(pipe.recv_bytes())
            except EOFError:
                break
            torch.manual_seed(0)
            try:
                answer = True, function(*args)
            except Exception:
                answer = False, traceback.format_exc()
            pipe.send_bytes(pickle.dumps(answer))
