"""`hasten COMMAND`: one line per command here, one file each beside it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from hasten import __version__
from hasten.cli import bench, certify, check, generate, models, run, warmup
from hasten.errors import HastenError

COMMANDS = {
    "generate": generate,
    "run": run,
    "certify": certify,
    "check": check,
    "models": models,
    "bench": bench,
    "warmup": warmup,
}


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, and where to read more."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    p = Parser("hasten", description="Makes a live PyTorch transformer fast where it stands.")
    p.add_argument("--version", action="version", version=f"hasten {__version__}")
    commands = p.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(name, help=summary, description=summary)
        module.arguments(sub)
        sub.set_defaults(run=module.run)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 for a result that is bad news, 2 for input that cannot be used, told in one line."""
    args = parser().parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush at exit fails again
        return 0
    except (HastenError, OSError) as e:
        print(f"hasten: {_one_line(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hasten: interrupted", file=sys.stderr)
        return 130


def _one_line(e: Exception) -> str:
    if isinstance(e, OSError) and e.filename:
        return f"{e.filename}: {e.strerror}"
    return " ".join(str(e).split())


if __name__ == "__main__":
    sys.exit(main())
