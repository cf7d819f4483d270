"""Measure speed beside plain transformers and other engines, in one run, in turns.

Medians, least and most of interleaved runs, on models of well-known shapes with random weights or from a folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli import ranks
from hasten.cli.load import check_output, quiet
from hasten.cli.ranks import add_ranks
from hasten.errors import ConfigError

if TYPE_CHECKING:
    from hasten.bench.report import Report
    from hasten.bench.work import Work

DEFAULT = ("gpt2:fp32", "gpt2:bf16", "bert-base:fp32", "bert-base:bf16", "minilm:fp32")
COUNTS = ("batch", "prompt", "new", "runs", "threads")


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "work",
        nargs="*",
        default=DEFAULT,
        metavar="KIND:MODEL:DTYPE",
        help="KIND: generate, decode, prefill, encode, offline, load, start or cold-start; without one, decoders "
        f"generate and encoders encode. MODEL: a shape or a folder. Default: {' '.join(DEFAULT)}",
    )
    p.add_argument("--standard", action="store_true", help="the table of docs/benchmarks.md, beside its targets")
    p.add_argument("--quick", action="store_true", help="tiny models: shows that the benchmark runs, not how fast")
    p.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add_ranks(p)
    p.add_argument("--peers", type=names, default=("transformers", "live"), metavar="NAME,...", help=_PEERS)
    p.add_argument("--threads", type=int, help="processor threads (default: torch's)")
    p.add_argument(
        "--batch", type=counts, metavar="N,...", help="sequences at once (default: 1; offline: 600 requests)"
    )
    p.add_argument(
        "--prompt",
        "--context",
        type=counts,
        metavar="N,...",
        help="tokens of the prompt or of an encoder's input (default: 128; offline: up to 1024)",
    )
    p.add_argument("--new", type=int, help="tokens to generate (default: 128; offline: up to 512)")
    p.add_argument(
        "--batch_invariant",
        "--batch-invariant",
        action="store_true",
        help="Hasten's engine with batch_invariant=True: what that costs",
    )
    p.add_argument("--runs", type=int, help="timed turns (default: 5; 3 for --standard)")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--markdown", type=Path, metavar="FILE")
    p.add_argument(
        "--profile", type=Path, metavar="FILE", help="where Hasten's time goes, kernel by kernel, as Markdown"
    )
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="needs the bench extra")


_PEERS = (
    "engines to measure beside Hasten: transformers, live (transformers' generate() on Hasten), compiled "
    "(torch.compile with a static cache: minutes), deepspeed, vllm, gpt-fast where installed; none for Hasten alone"
)


def run(args: argparse.Namespace) -> int:
    if ranks.to_start(args):
        _check(args)
        return ranks.start(args)
    with ranks.first_speaks():
        return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    import torch

    from hasten.bench.ceilings import measure
    from hasten.bench.measure import Bench
    from hasten.bench.report import Report, machine
    from hasten.bench.targets import standard
    from hasten.bench.work import quick
    from hasten.inject.groups import local_device

    _check(args)
    quiet()
    source, targets = standard()
    works = [t.work for t in targets] if args.standard else _works(args)
    if args.quick:
        works = list(dict.fromkeys(quick(w) for w in works))
    for w in works:
        w.check()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device, shared = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")), ranks.started() > 1
    if device.type == "cuda":
        device = local_device() if shared else torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    ceilings = measure(device, dict.fromkeys(w.dtype for w in works))
    bench = Bench(device, ceilings, args.peers, args.runs or (3 if args.standard else 5))
    bench.profiles, bench.invariant, bench.ranks = [] if args.profile else None, args.batch_invariant, ranks.started()
    told = [t for t in targets if t.work in works] if (args.standard or device.type == "cuda") and not shared else []
    if shared:
        bench.notes.append(
            f"Hasten's models are divided among {bench.ranks} ranks; rank 0's times, and its share of work"
        )
    report = Report(machine(ceilings), told, source, notes=bench.notes)
    _follow(bench, works, report, args)
    print(report.markdown(), end="")
    if args.plot and ranks.is_first():
        from hasten.bench.plot import plot

        plot(report, args.plot)
    return 1 if bench.failed else 0


def _follow(bench: Any, works: list[Work], report: Report, args: argparse.Namespace) -> None:
    """Measure, and tell and write down each work as soon as it is done: whatever stops the run loses nothing else."""
    from tqdm import tqdm

    from hasten.bench.report import row

    with tqdm(total=len(works), unit="work", leave=False, disable=None) as bar:
        bench.advance = bar.refresh
        for w, results in bench.measure(works):
            report.works.append(w)
            report.results += results
            bar.update()
            bar.write(row(w, results), file=sys.stderr)
            _write(report, args)
            if args.profile and ranks.is_first():
                args.profile.write_text("\n".join(bench.profiles), encoding="utf-8")
    _write(report, args)  # with what is known at the end only


def _write(report: Report, args: argparse.Namespace) -> None:
    if not ranks.is_first():
        return
    if args.markdown:
        args.markdown.write_text(report.markdown(), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(report.plain(), indent=1) + "\n", encoding="utf-8")


def _works(args: argparse.Namespace) -> list[Work]:
    """Every work asked for in every size, those on the same model side by side."""
    from hasten.bench.work import Work, read_work, sizes

    works = []
    for text in args.work:
        kind, model, dtype = read_work(text)
        batch, prompt, new = sizes(kind)
        every = product(args.batch or (batch,), args.prompt or (prompt,))
        works += [Work(kind, model, dtype, b, p, args.new or new) for b, p in every]
    return works


def _check(args: argparse.Namespace) -> None:
    """ConfigError for counts below one, devices there are not, unknown peers and files that could not be written."""
    from hasten.bench.peers import PEERS
    from hasten.inject.kinds import DEVICE

    try:
        if args.device is not None:
            DEVICE.read(args.device)
    except ValueError as e:
        raise ConfigError(f"--device {args.device}: expected {e}") from e
    for name in COUNTS:
        given = getattr(args, name)
        for n in () if given is None else given if isinstance(given, tuple) else (given,):
            if n < 1:
                raise ConfigError(f"--{name} must be at least 1, got {n}")
    alone = [w for w in args.work if w.split(":")[0] in ("start", "cold-start")]
    if alone and (args.num_gpus or ranks.started()) > 1:
        raise ConfigError(f"{alone[0]} is measured in one process; leave --num_gpus out")
    unknown = [p for p in args.peers if p not in PEERS]
    if unknown:
        raise ConfigError(f"--peers {unknown[0]}: there are {', '.join(PEERS)}, and none")
    for n in ("json", "markdown", "profile", "plot"):
        check_output(f"--{n}", getattr(args, n))


def counts(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))
