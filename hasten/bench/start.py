"""How long it takes until the first token, in a process of its own that knows nothing of this one's caches.

`python -m hasten.bench.start MODEL DTYPE DEVICE PROMPT BEGAN` is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from hasten.bench.work import NAMES, Work, read_work


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds, one after another; the last two are sums."""

    imports: float  # from the start of the process: Python, torch, transformers
    model: float  # until a model of random weights stands on the device
    init_inference: float
    first_token: float
    two_tokens: float  # the first call that decodes
    again: float  # one token once more
    ready: float  # init_inference and the first token
    process: float  # all up to the first token

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value:.2f} s" for name, value in asdict(self).items())


def measure(w: Work, device: Any) -> Start:
    """Start a process and let it tell; a cold start compiles into an empty cache, others use what is there."""
    began = time.time()
    command = [sys.executable, "-m", "hasten.bench.start", w.model, NAMES[w.dtype], str(device), str(w.prompt)]
    with tempfile.TemporaryDirectory() as empty:
        cache = {"TRITON_CACHE_DIR": empty} if w.kind == "cold-start" else {}
        done = subprocess.run(
            [*command, str(began)], check=False, env=os.environ | cache, capture_output=True, text=True
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"{' '.join(command[1:])}: {lines[-1] if lines else f'exit status {done.returncode}'}")
    return Start(**json.loads(done.stdout.splitlines()[-1]))


def run(model: str, dtype: str, device: str, prompt: int, began: float) -> Start:
    """This process from its start, which was at `began`, seconds since the epoch, to its first tokens."""
    import torch

    import hasten.inject.api  # noqa: F401 - with what the user's own program has imported: torch, transformers
    from hasten.bench.engines import Stand
    from hasten.bench.shapes import model_class

    _, name, read = read_work(f"{model}:{dtype}")
    model_class(name)
    imported = time.time()
    stand = Stand(name, read, torch.device(device), alone=True)
    tokens = [t % stand.vocab for t in range(prompt)]
    _wait()
    made = time.time()
    engine = stand.engine
    _wait()
    taken = time.time()
    engine.generate([tokens], max_new_tokens=1, ignore_eos=True)
    first = time.time()
    engine.generate([tokens], max_new_tokens=2, ignore_eos=True)
    second = time.time()
    engine.generate([tokens], max_new_tokens=1, ignore_eos=True)
    parts = (began, imported, made, taken, first, second, time.time())
    return Start(*(b - a for a, b in pairwise(parts)), ready=first - made, process=first - began)


def main(arguments: Sequence[str]) -> None:
    model, dtype, device, prompt, began = arguments
    sys.stdout.write(json.dumps(asdict(run(model, dtype, device, int(prompt), float(began)))) + "\n")


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
