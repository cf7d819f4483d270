"""Compile ahead what a model's calls need, so that the next process finds it in the cache.

Triton keeps compiled kernels in TRITON_CACHE_DIR (~/.triton/cache), for its own version, this Python and this GPU. What
a model can need is found by rehearsing its launches and compiled by all processors; a few calls follow, since torch and
graphs prepare themselves too. With `--only` there are the calls alone. Several models are warmed up beside each other,
each in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.cli.bench import counts
from hasten.cli.load import quiet, torch_dtype
from hasten.errors import ConfigError

if TYPE_CHECKING:
    from hasten.bench.engines import Stand
    from hasten.bench.work import Work

BATCHES, PROMPTS = (1, 2, 4, 8, 16, 32), (16, 128, 1024)


@dataclass(frozen=True, slots=True)
class Plan:
    """One model, and what it is called with: every batch of the shortest prompts, and one prompt of each length.

    whole: what any other call can need is compiled too.
    """

    model: str
    dtype: str
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    whole: bool = True

    def arguments(self, device: str | None) -> list[str]:
        """Of a `hasten warmup` that does this alone."""
        sizes = ["--batch", ",".join(map(str, self.batches)), "--prompt", ",".join(map(str, self.prompts))]
        more = [*([] if self.whole else ["--only"]), *([] if device is None else ["--device", device])]
        return [self.model, "--dtype", self.dtype, *sizes, *more]


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", nargs="*", help="folder of a Hugging Face model, or a shape of `hasten bench`")
    p.add_argument("--standard", action="store_true", help="what `hasten bench --standard` will call")
    p.add_argument("--dtype", default="bf16", help="fp32, fp16, bf16 (default: bf16)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    p.add_argument("--batch", type=counts, default=BATCHES, metavar="N,...", help="sequences at once")
    p.add_argument("--prompt", type=counts, default=PROMPTS, metavar="N,...", help="tokens of a prompt")
    p.add_argument("--only", action="store_true", help="what these sizes need, and nothing for other ones")
    p.add_argument("--processes", type=int, metavar="N", help="that compile (default: one a processor)")


def run(args: argparse.Namespace) -> int:
    from hasten.bench.shapes import SHAPES, kind
    from hasten.bench.targets import standard

    quiet()
    torch_dtype(args.dtype)
    plans = [Plan(model, args.dtype, args.batch, args.prompt, not args.only) for model in args.model]
    plans += list(plans_of([t.work for t in standard()[1]])) if args.standard else []
    if not plans:
        raise ConfigError("nothing to warm up: name a model, or --standard")
    for p in plans:
        if kind(p.model) is None:
            raise ConfigError(f"{p.model}: no folder of a model that Hasten knows, and none of {', '.join(SHAPES)}")
    if len(plans) == 1:
        _warm_up(plans[0], args.device, args.processes or os.cpu_count() or 1)
        return 0
    return _beside_each_other(plans, args.device)


def plans_of(works: Sequence[Work]) -> Iterator[Plan]:
    """What has to be called for these works. Offline work gets a plan of its own, for it meets every batch size."""
    from hasten.bench.work import NAMES, SHORTEST

    for model, dtype in dict.fromkeys((w.model, w.dtype) for w in works):
        mine = [w for w in works if (w.model, w.dtype) == (model, dtype)]
        several = [w for w in mine if w.kind not in ("offline", "start", "cold-start")]
        if several:
            batches, prompts = ({w.batch for w in several}, {w.prompt for w in several})
            yield Plan(model, NAMES[dtype], tuple(sorted(batches)), tuple(sorted(prompts)), whole=False)
        if len(several) < len(mine):
            yield Plan(model, NAMES[dtype], tuple(2**i for i in range(9)), (SHORTEST, 512))


def _beside_each_other(plans: Sequence[Plan], device: str | None) -> int:
    """Every plan in a process of its own; what each says as it ends, and 1 if one of them failed."""
    began = time.perf_counter()
    processes = max((os.cpu_count() or 1) // max(sum(p.whole for p in plans), 1), 1)
    command = [sys.executable, "-m", "hasten", "warmup", "--processes", str(processes)]
    started = [subprocess.Popen([*command, *p.arguments(device)]) for p in plans]
    failed = sum(process.wait() != 0 for process in started)
    print(f"{len(plans)} warm-ups took {time.perf_counter() - began:.1f} s, {folder()} holds {kernels()} kernels")
    return int(failed > 0)


def _warm_up(p: Plan, device: str | None, processes: int) -> None:
    import torch
    from tqdm import tqdm

    from hasten.bench.engines import Stand
    from hasten.ops.backends import load

    dtype = torch_dtype(p.dtype)
    assert dtype is not None
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stand = Stand(p.model, dtype, where, alone=True)
    before, began = kernels(), time.perf_counter()
    if p.whole and where.type == "cuda" and "triton" in load():
        _compile(stand, processes)
    for batch, tokens in tqdm(list(_calls(p, stand.room)), unit="call", desc=p.model, leave=False, disable=None):
        _call(stand, batch, tokens)
    took, made = time.perf_counter() - began, kernels() - before
    stand.close()
    print(f"{p.model} {p.dtype}: {made} kernels compiled, {took:.1f} s with loading, {folder()} holds {kernels()}")


def _compile(stand: Stand, processes: int) -> None:
    """What the model's launchers can ask for."""
    import torch

    from hasten.cli.rehearse import rehearse
    from hasten.ops.triton.compiled import compile_all, counting, current_target

    with torch.inference_mode(), counting() as found:
        for backbone in stand.engine.backbones:
            rehearse(backbone.transformer)
    compile_all(found, current_target(), processes)


def _calls(p: Plan, room: int | None) -> Iterator[tuple[int, int]]:
    """(sequences, tokens of each)."""
    lengths = sorted({n if room is None else min(n, room - 3) for n in p.prompts})
    yield from ((batch, lengths[0]) for batch in p.batches)
    yield from ((1, n) for n in lengths[1:])


def _call(stand: Stand, batch: int, tokens: int) -> None:
    import torch

    from hasten.bench.kinds import prompts

    with torch.inference_mode():
        if stand.kind == "decoder":
            stand.engine.generate(prompts(stand.vocab, [tokens] * batch), max_new_tokens=3, ignore_eos=True)
        else:
            stand.engine(**stand.inputs(batch, tokens))


def folder() -> Path:
    """Where Triton keeps what it compiled."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def kernels() -> int:
    """Compiled kernels in the cache."""
    return sum(1 for _ in folder().glob("*/*.cubin"))
