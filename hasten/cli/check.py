"""Say what this machine offers and which kernels are in use.

Exit status 1 if something that Hasten needs is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator

from hasten.cli.warmup import folder, kernels

NEEDED = ("torch", "transformers", "safetensors", "numpy", "tqdm")
OPTIONAL = ("triton", "matplotlib", "peft")


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ops", action="store_true", help="every op and its implementations")


def run(args: argparse.Namespace) -> int:
    missing = [name for name in NEEDED if _version(name) is None]
    print("\n".join([*_machine(), *_packages(), *(_devices() if not missing else ())]))
    if missing:
        print(f"missing: {', '.join(missing)}")
        return 1
    print("\n".join(_ops(args.ops)))
    return 0


def _machine() -> Iterator[str]:
    yield f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"processors   {os.cpu_count()}, {len(os.sched_getaffinity(0))} usable"
    compilers = [c for c in ("cc", "c++", "nvcc") if shutil.which(c)]
    yield f"compilers    {', '.join(compilers) or 'none'}"


def _packages() -> Iterator[str]:
    for name in (*NEEDED, *OPTIONAL):
        note = "" if name in NEEDED else "  (optional)"
        yield f"{name:12} {_version(name) or 'not installed'}{note}"


def _devices() -> Iterator[str]:
    import torch

    yield f"threads      {torch.get_num_threads()}; instruction set {torch.backends.cpu.get_cpu_capability()}"
    yield f"cpu kernels  {_native()}"
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}       {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
    if not torch.cuda.is_available():
        yield "cuda         none: the CPU serves"
    else:
        yield f"kernels      {kernels()} compiled in {folder()}; `hasten warmup` compiles a model's ahead"


def _native() -> str:
    """Whether those of our own are in use, with what, or why not."""
    from hasten.ops.cpu.library import LEVELS, load
    from hasten.ops.cpu.native import threads

    found = load()
    if isinstance(found, str):
        return f"torch's: {found}"
    return f"Hasten's, {LEVELS[found.level]}, threads {threads()}"


def _ops(every: bool) -> Iterator[str]:
    from hasten.ops import TABLE
    from hasten.ops.backends import load

    load()
    backends = sorted({i.backend for op in TABLE.values() for i in op.implementations})
    counts = {b: sum(any(i.backend == b for i in op.implementations) for op in TABLE.values()) for b in backends}
    yield f"ops          {len(TABLE)}, with " + ", ".join(f"{b} for {n}" for b, n in counts.items())
    if every:
        for op in TABLE.values():
            rows = [f"{i.backend} ({', '.join(sorted(i.devices))})" for i in op.implementations]
            yield f"  {op.name:14} {', '.join([*rows, 'reference'])}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
