"""Commands that divide a model among ranks: they start them, or find that they are one of them."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence

from hasten.errors import ConfigError


def add_ranks(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--num_gpus", "--num-gpus", type=int, metavar="N", help="divide the model among N GPUs, or N processes without"
    )


def started() -> int:
    """How many ranks there are; this process alone is one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def to_start(args: argparse.Namespace) -> bool:
    """Whether --num_gpus asks for ranks that have not been started."""
    return args.num_gpus is not None and args.num_gpus != started()


def start(args: argparse.Namespace, more: Sequence[str] = ()) -> int:
    """The same command on so many ranks, with more arguments."""
    from hasten.cli import run as launcher

    if "WORLD_SIZE" in os.environ:
        raise ConfigError(f"--num_gpus {args.num_gpus}: {started()} ranks were started already; leave it out")
    if args.device and ":" in args.device:
        raise ConfigError(f"--device {args.device}: with --num_gpus each rank has a GPU of its own; say cuda, or cpu")
    p = argparse.ArgumentParser("hasten run")
    launcher.arguments(p)
    given = ["--num_gpus", str(args.num_gpus), "--module", "hasten", *args.given, *more]
    return launcher.run(p.parse_args(given))


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """Rank 0 alone prints inside."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield
