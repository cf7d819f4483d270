"""`python -m hasten.ops.cpu` compiles the kernels anew and prints the command that did it."""

from __future__ import annotations

import sys

from hasten.ops.cpu.build import BuildError, build

if __name__ == "__main__":
    try:
        print(" ".join(build()))
    except BuildError as e:
        sys.exit(f"the kernels were not compiled: {e}")
