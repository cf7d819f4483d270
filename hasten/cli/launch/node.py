"""One node's ranks: started, watched and ended together.

torch's elastic multiprocessing starts and closes them and keeps their logs, and torch's TCPStore is where they and the
other nodes meet. The agent above those is left out, for it gives a rank that ignores SIGTERM thirty seconds, and loses
which of two deaths was first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hasten.cli.launch.signals import ending, listen
from hasten.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

POLL = 0.01  # seconds between looks at the ranks
LAST_WORDS, GRACE = 1, 5  # seconds for a rank to end by itself once it has raised, and for the others once told to end
MEET = timedelta(minutes=10)  # for nodes that wait for each other
ENDED = 128 + signal.SIGTERM


@dataclass(frozen=True, slots=True)
class Node:
    """One of the nodes of a run, how many ranks it has, and where all of them meet (port 0: one that is free)."""

    rank: int
    nodes: int
    workers: int
    master_addr: str
    master_port: int


def launch(command: Sequence[str], node: Node, environment: Mapping[str, str], *, all_output: bool) -> int:
    """Runs the command once a rank; the exit status of the first that failed, or 0."""
    store, first, world = _meet(node)
    shared = {**_threads(node.workers), **environment, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(node.workers)}
    shared |= {"MASTER_ADDR": node.master_addr, "MASTER_PORT": str(store.port), "GROUP_RANK": str(node.rank)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "run"}
    ranks = [shared | {"RANK": str(first + i), "LOCAL_RANK": str(i)} for i in range(node.workers)]
    shown = 0 if node.rank == 0 and not all_output else -1  # the local rank that has our own output streams
    with tempfile.TemporaryDirectory(prefix="hasten-run-") as folder, _torch_held_back(), ending() as caught:
        context = _start(command, ranks, folder, shown=shown, all_output=all_output)
        listen(caught)  # older torch has put its own handlers there
        lines = Lines(context, first) if all_output else None
        well = False
        try:
            failed = _watch(context, node, store, caught)
            well = failed is None and not caught
            ours = failed is not None and _claim(store, node)
        finally:
            _close(context, signal.Signals(caught[0]) if caught else signal.SIGTERM, everything=not well)
            if lines:
                lines.finish()
        if caught:
            return 128 + caught[0]
        if failed is None:
            return 0
        if failed < 0 or not ours:
            return ENDED  # another node tells
        return _tell(context, failed, first, world, seen=all_output or failed == shown)


def _start(
    command: Sequence[str], ranks: Sequence[dict[str, str]], folder: str, *, shown: int, all_output: bool
) -> SubprocessContext:
    """The ranks, given their environments. What is not shown goes to files, if anybody may want to see it."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    kept = {i: Std.ALL if all_output else Std.ERR for i in range(len(ranks)) if i != shown}
    context = start_processes(
        "rank",
        command[0],
        args={i: tuple(command[1:]) for i in range(len(ranks))},
        envs=dict(enumerate(ranks)),
        logs_specs=DefaultLogsSpecs(folder, redirects=kept, local_ranks_filter={shown}),
    )
    assert isinstance(context, SubprocessContext)
    return context


def _meet(node: Node) -> tuple[TCPStore, int, int]:
    """Where ranks meet, the first of this node's ranks, and the number of all."""
    from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    where = f"{node.master_addr}:{node.master_port}"
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # the store waits without looking at signals
    try:
        store = TCPStore(node.master_addr, node.master_port, None, node.rank == 0, MEET, wait_for_workers=False)
        sizes = {node.rank: node.workers}
        if node.nodes > 1:
            store.set(f"hasten/workers/{node.rank}", str(node.workers))
            sizes = {i: int(store.get(f"hasten/workers/{i}")) for i in range(node.nodes)}
    except DistError as e:
        if node.rank == 0 and "EADDRINUSE" in str(e):
            raise ConfigError(f"--master_port {node.master_port}: in use on this machine; name another") from e
        raise ConfigError(
            f"node {node.rank} of {node.nodes} did not meet the others at {where}: {str(e).splitlines()[0]}"
        ) from e
    finally:
        signal.signal(signal.SIGINT, before)
    return store, sum(n for i, n in sizes.items() if i < node.rank), sum(sizes.values())


def _threads(workers: int) -> dict[str, str]:
    """Ranks share the processors, unless the user has said how."""
    if workers == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(cores // workers, 1))}


@contextlib.contextmanager
def _torch_held_back() -> Iterator[None]:
    """torch neither tells of every death in its own words, nor interrupts what runs when a signal comes."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        del os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"]


def _watch(context: SubprocessContext, node: Node, store: TCPStore, caught: list[int]) -> int | None:
    """The local rank that failed first, -1 if one of another node did, None at a good end or a signal."""
    processes = {i: h.proc for i, h in context.subprocess_handlers.items()}
    errors = {i: Path(f) for i, f in context.error_files.items()}
    next_look = time.monotonic()
    while not caught:
        raised = [i for i, f in errors.items() if f.exists()]
        dead = {i: p.poll() for i, p in processes.items()}  # now, since a death that was heard of has been
        # What ended without a word, in one hundredth of a second with a traceback, is rather its cause than its effect.
        silent = [i for i, code in dead.items() if code and not errors[i].exists()]
        if silent:
            return silent[0]
        if raised:
            with contextlib.suppress(subprocess.TimeoutExpired):
                processes[raised[0]].wait(LAST_WORDS)  # it may have files to close
            return min((i for i, f in errors.items() if f.exists()), key=lambda i: _error(errors[i])[1])
        done = all(code == 0 for code in dead.values())
        if node.nodes > 1 and (done or time.monotonic() > next_look):
            next_look = time.monotonic() + 0.5
            if done and node.rank > 0:
                store.add("hasten/done", 1)
                return None
            if _lost(store):
                return -1
            done = done and store.add("hasten/done", 0) == node.nodes - 1  # they need our store to the end
        if done:
            return None
        time.sleep(POLL)
    return None


def _lost(store: TCPStore) -> bool:
    """Whether another node has failed, or the one with the store is gone."""
    try:
        return store.check(["hasten/failed"])
    except RuntimeError:
        return True


def _claim(store: TCPStore, node: Node) -> bool:
    """Whether this node is the first to fail, and so the one to tell."""
    if node.nodes == 1:
        return True
    try:
        return store.compare_set("hasten/failed", "", str(node.rank)) == str(node.rank).encode()
    except RuntimeError:
        return False


def _close(context: SubprocessContext, number: signal.Signals, *, everything: bool) -> None:
    """Ends the ranks that run, and whatever they started."""
    context.close(number, GRACE)
    for pid in context.pids().values() if everything else ():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _tell(context: SubprocessContext, failed: int, first: int, world: int, *, seen: bool) -> int:
    """Says why a rank failed, from its traceback or the end of its stderr; its exit status, as a shell has it."""
    error, code = Path(context.error_files[failed]), context.subprocess_handlers[failed].proc.poll()
    if error.exists():
        text, _ = _error(error)
    elif not seen:
        text = "".join(
            Path(context.stderrs[failed]).read_text(encoding="utf-8", errors="replace").splitlines(True)[-40:]
        )
    else:
        text = ""
    if error.exists() and (code is None or code < 0):
        code = 1  # it had raised, and was closed before it had ended
    sys.stdout.flush()
    sys.stderr.write(f"{text.rstrip()}\n" if text.strip() else "")
    sys.stderr.write(f"hasten: rank {first + failed} of {world} {_how(code or 1)}\n")
    sys.stderr.flush()
    return 128 - code if code and code < 0 else code or 1


def _error(file: Path) -> tuple[str, int]:
    """The traceback that a rank has left, and when it was raised, in nanoseconds."""
    told = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(told["message"], str):
        return told["message"], told.get("raised", file.stat().st_mtime_ns)
    return told["message"]["extraInfo"]["py_callstack"], file.stat().st_mtime_ns  # a program with torch's `record`


def _how(code: int) -> str:
    names = {-s.value: s.name for s in signal.Signals}
    return f"was killed by {names.get(code, f'signal {-code}')}" if code < 0 else f"failed with exit status {code}"


class Lines:
    """Whole lines of every rank's output, as they come, with the rank in front."""

    def __init__(self, context: SubprocessContext, first: int) -> None:
        self.files: list[tuple[str, str, TextIO]] = []
        for i in context.stdouts:
            self.files += [(f"[{first + i}] ", context.stdouts[i], sys.stdout)]
            self.files += [(f"[{first + i}] ", context.stderrs[i], sys.stderr)]
        self.places = [0] * len(self.files)
        self.halves = [b""] * len(self.files)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Once the ranks have ended: what is left, also of a last line without an end."""
        self.done.set()
        self.thread.join()

    def _follow(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            while not self.done.wait(0.05):
                self._copy()
            self._copy(last=True)
            return
        os.kill(os.getpid(), signal.SIGTERM)  # whoever read the output has enough

    def _copy(self, *, last: bool = False) -> None:
        for k, (name, path, to) in enumerate(self.files):
            with open(path, "rb") as file:
                file.seek(self.places[k])
                new = file.read()
            self.places[k] += len(new)
            *whole, self.halves[k] = (self.halves[k] + new).split(b"\n")
            if last and self.halves[k]:
                whole.append(self.halves[k])
            if whole:
                to.write("".join(f"{name}{line.decode(errors='replace')}\n" for line in whole))
                to.flush()
