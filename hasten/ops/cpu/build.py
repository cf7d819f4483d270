"""Compile kernels.cpp with the C++ compiler at hand.

Installing does it (hatch_build.py), which is why this file imports the standard library alone; so does
`python -m hasten.ops.cpu`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = ("calls.h", "numbers.h", "pool.h", "product.h", "attention.h", "stack.h")
SOURCES = (HERE / "kernels.cpp", *(HERE / name for name in HEADERS))
LIBRARY = HERE / "kernels.so"
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")
FLAGS = (
    "-x",
    "c++",
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
)


class BuildError(Exception):
    """Why there is no library."""


def stamp() -> str:
    """What tells these sources from others; the library says which it was built from."""
    return hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:16]


def compilers() -> list[list[str]]:
    """The commands to try, $CXX and $CC first."""
    named = [os.environ[name].split() for name in ("CXX", "CC") if os.environ.get(name, "").strip()]
    return named + [[path] for path in map(shutil.which, COMPILERS) if path]


def build(library: Path = LIBRARY, extra: tuple[str, ...] = ()) -> list[str]:
    """Compile `library` and return the command; BuildError where no compiler can."""
    problems = ["no C++ compiler found"]
    for compiler in compilers():
        part = library.with_name(f"{library.name}.{os.getpid()}")
        command = [*compiler, *FLAGS, *extra, f'-DHASTEN_STAMP="{stamp()}"', str(SOURCES[0]), "-o", str(part), "-lm"]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except OSError as e:
            problems.append(f"{compiler[0]}: {e}")
            continue
        if done.returncode == 0:
            part.replace(library)  # a process that has the old one loaded keeps it
            return command
        part.unlink(missing_ok=True)
        problems.append(f"{' '.join(compiler)} failed:\n{done.stderr[:2000]}")
    raise BuildError("\n".join(problems[1:] or problems))
