"""Functions on two ranks with a GPU each, which the launcher starts.

    answers = run([(function, arguments), ...])  # for each call its answers, one of each rank

What `ranks` says of functions and answers holds here too. A call that raises answers with its traceback.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RANKS = 2

Calls = Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]


def run(calls: Calls, timeout: float = 150.0) -> list[list[Any]]:
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "calls")
        asked.write_bytes(pickle.dumps(list(calls)))
        command = [sys.executable, "-m", "hasten", "run", "--num_gpus", str(RANKS), "--all_output", "--module"]
        done = subprocess.run(
            [*command, "tests.parallel.gpus", str(asked)],
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        told = [pickle.loads(Path(f"{asked}.{rank}").read_bytes()) for rank in range(RANKS)]
        return [list(each) for each in zip(*told, strict=True)]


def serve(asked: str) -> None:
    import torch
    import torch.distributed as dist

    rank, kind = int(os.environ["RANK"]), "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    answers: list[Any] = []
    for function, arguments in pickle.loads(Path(asked).read_bytes()):
        torch.manual_seed(0)
        try:
            answers.append(function(*arguments))
        except Exception:
            answers.append(traceback.format_exc())
    Path(f"{asked}.{rank}").write_bytes(pickle.dumps(answers))
    dist.destroy_process_group()


if __name__ == "__main__":
    serve(sys.argv[1])
