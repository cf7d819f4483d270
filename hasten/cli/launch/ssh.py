"""Several nodes from one: `hasten run --node_rank` on each host over ssh, all of which end when one fails."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, TextIO

from hasten.cli.launch.signals import ending

CARRIED = ("NCCL", "PYTHON", "HASTEN", "UCX", "MV2", "MLFLOW")  # what variables begin with that hosts get
ENDED, PATIENCE = 128 + signal.SIGTERM, 9  # seconds in which a host closes its ranks and leaves


def remote(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """For a host's shell: `hasten` with these arguments, in this folder, with this Python and its variables."""
    carried = {name: value for name, value in os.environ.items() if name.startswith(CARRIED)}
    variables = [f"{name}={value}" for name, value in {**carried, **environment}.items()]
    words = ["env", *variables, sys.executable, "-m", "hasten", *arguments]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"


def launch(commands: Mapping[str, str]) -> int:
    """Runs a command on each host; the exit status of the first that failed, or 0.

    A host's `hasten run` ends when its standard input does, so closing that, or the death of this process, ends all.
    """
    with ending() as caught:
        failed = _run(commands, caught)
    if caught:
        return 128 + caught[0]
    causes = [(host, code) for host, code in failed if code != ENDED] or failed  # others ended since one had failed
    if not causes:
        return 0
    host, code = causes[0]
    print(f"hasten: {host}: {'ssh failed' if code == 255 else 'ended'} with exit status {code}", file=sys.stderr)
    return 128 - code if code < 0 else code


def _run(commands: Mapping[str, str], caught: list[int]) -> list[tuple[str, int]]:
    """The hosts that failed and how, in that order."""
    ssh, pipe = ("ssh", "-o", "BatchMode=yes", "--"), subprocess.PIPE
    running = {
        host: subprocess.Popen([*ssh, host, command], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        for host, command in commands.items()
    }
    copies = [_copy(p.stdout, sys.stdout) for p in running.values()]
    copies += [_copy(p.stderr, sys.stderr) for p in running.values()]
    failed: list[tuple[str, int]] = []
    deadline = None
    while running and (deadline is None or time.monotonic() < deadline):
        ended = {host: p.wait() for host, p in running.items() if p.poll() is not None}
        failed += [(host, code) for host, code in ended.items() if code]
        running = {host: p for host, p in running.items() if host not in ended}
        if (failed or caught) and deadline is None:
            deadline = time.monotonic() + PATIENCE
            for p in running.values():
                assert p.stdin
                p.stdin.close()
        time.sleep(0.05)
    for p in running.values():
        p.kill()
    for copy in copies:
        copy.join(1)
    return failed


def _copy(source: IO[bytes] | None, to: TextIO) -> threading.Thread:
    """A thread that hands on whole lines, so that those of several hosts do not mix."""

    def copy() -> None:
        for line in source or ():
            to.write(line.decode(errors="replace"))
            to.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread
