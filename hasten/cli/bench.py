"""Measure speed beside plain transformers, in one run, in turns.

Medians, least and most of interleaved runs, on models of well-known shapes with random weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hasten.cli.load import check_output, torch_dtype
from hasten.errors import ConfigError

DEFAULT = ("gpt2:fp32", "gpt2:bf16", "bert-base:fp32", "bert-base:bf16", "minilm:fp32")


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("work", nargs="*", default=DEFAULT, metavar="SHAPE:DTYPE", help=f"default: {' '.join(DEFAULT)}")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, help="processor threads (default: torch's)")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--prompt", type=int, default=128, help="tokens of the prompt, or of an encoder's input")
    p.add_argument("--new", type=int, default=128, help="tokens to generate")
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--markdown", type=Path, metavar="FILE")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="needs the bench extra")


def run(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from hasten.bench.shapes import DECODERS, ENCODERS
    from hasten.bench.timing import machine, markdown, plain
    from hasten.bench.work import measure

    wanted = []
    for work in args.work:
        name, _, dtype = work.partition(":")
        if name not in DECODERS | ENCODERS:
            raise ConfigError(f"{work}: no shape {name}; there are {', '.join(DECODERS | ENCODERS)}")
        wanted.append((name, torch_dtype(dtype or "fp32")))
    _check(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results = []
    sizes = {"device": args.device, "batch": args.batch, "prompt": args.prompt, "new": args.new, "runs": args.runs}
    with tqdm(total=sum((3 if n in DECODERS else 8) * args.runs for n, _ in wanted), unit="run", leave=False) as bar:
        for name, dtype in wanted:
            bar.set_description(name)
            assert dtype is not None
            results += measure(name, dtype, **sizes, advance=bar.update)
    about = machine()
    print(markdown(results, about))
    if args.markdown:
        args.markdown.write_text(markdown(results, about), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(plain(results, about), indent=1) + "\n", encoding="utf-8")
    if args.plot:
        from hasten.bench.plot import plot

        plot(results, about, args.plot)
    return 0


def _check(args: argparse.Namespace) -> None:
    """ConfigError for counts below one, devices there are not and files that could not be written."""
    from hasten.inject.kinds import DEVICE

    try:
        DEVICE.read(args.device)
    except ValueError as e:
        raise ConfigError(f"--device {args.device}: expected {e}") from e
    for n in ("batch", "prompt", "new", "runs", "threads"):
        if getattr(args, n) is not None and getattr(args, n) < 1:
            raise ConfigError(f"--{n} must be at least 1, got {getattr(args, n)}")
    for n in ("json", "markdown", "plot"):
        check_output(f"--{n}", getattr(args, n))
