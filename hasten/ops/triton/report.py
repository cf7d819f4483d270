"""The tables of docs/kernels.md: `python -m hasten.ops.triton.report [FILE]` writes them into FILE, or prints them.

What the compiler makes of a kernel is read from its machine code; times are predicted from bytes moved, not measured.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import triton

import hasten.ops.triton  # noqa: F401 - registers the launchers
from hasten.ops.triton.compiled import HOPPER, Binary, compiling, inspect
from hasten.ops.triton.samples import SAMPLES, Sample
from hasten.ops.triton.samples_encoders import ENCODERS
from hasten.ops.triton.samples_one_row import ONE_ROW

BANDWIDTHS = {"H100": 3.0e12, "H200": 4.3e12}  # bytes per second that a plain copy moves, read and written
LAUNCH = 2e-6  # seconds that no kernel in a graph goes below, its edge included


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one call has to move through memory."""

    op: str
    shape: str
    bytes: int


def traffic() -> tuple[Traffic, ...]:
    """16-bit numbers throughout; every input is read once and every output written once."""
    cached = 2 * 8 * 128 * 2  # bytes that a token leaves in each layer: keys and values of 8 heads of 128
    return (
        Traffic("norm", "1 x 4096", 2 * 4096 * 2 + 4096 * 2),
        Traffic("norm", "4096 x 4096", 4096 * 2 * 4096 * 2 + 4096 * 2),
        Traffic("gated", "1 x 14336", 3 * 14336 * 2),
        Traffic("gated", "4096 x 14336", 4096 * 3 * 14336 * 2),
        Traffic("rope", "4096 x 40 x 128", 4096 * (2 * 40 * 128 * 2 + 128 * 4)),
        Traffic("write_pages", "4096 x 8 x 128", 4096 * (2 * cached + 8)),
        Traffic("attend_pages", "1 token behind 1,024", 1024 * cached),
        Traffic("attend_pages", "1 token behind 32,768", 32768 * cached),
        Traffic("attend_pages", "64 tokens behind 1,024 each", 64 * 1024 * cached),
    )


def compile_all() -> list[tuple[Sample, Binary]]:
    """Every kernel of every sample, compiled for Hopper; a sample that launches none that is new is a bug of it."""
    found = []
    with compiling() as driver:
        for sample in (*SAMPLES, *ENCODERS, *ONE_ROW):
            driver.loaded.clear()
            sample.run()
            assert driver.loaded, f"{sample}: no new kernel"
            found += [(sample, inspect(*kernel)) for kernel in dict.fromkeys(driver.loaded)]
    return found


def compiled_table(rows: list[tuple[Sample, Binary]]) -> str:
    head = "op|shape|dtype|kernel|warps|registers|spilled bytes|shared bytes|16-byte loads|matrix instruction"
    body = (
        (
            s.op,
            s.shape,
            str(s.dtype).removeprefix("torch."),
            f"`{b.kernel}`",
            *map(str, (b.warps, b.registers, b.spilled, b.shared, b.wide_loads, b.tensor_cores)),
        )
        for s, b in rows
    )
    title = f"Triton {triton.__version__}, sm_{HOPPER.arch}:\n\n"
    return title + table(head.split("|"), [list(r) for r in body], numbers=range(4, 9))


def predicted_table() -> str:
    head = ["op", "shape, 16-bit", "bytes moved", *(f"{name}, predicted us" for name in BANDWIDTHS)]
    body = [
        [
            t.op,
            t.shape,
            f"{t.bytes:,}",
            *(f"{max(t.bytes / speed, LAUNCH) * 1e6:,.1f}" for speed in BANDWIDTHS.values()),
        ]
        for t in traffic()
    ]
    return table(head, body, numbers=range(2, 5))


def table(head: list[str], body: list[list[str]], numbers: range) -> str:
    """Markdown, with columns of numbers aligned to the right."""
    rule = ["--:" if i in numbers else "---" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def fill(text: str, blocks: dict[str, str]) -> str:
    """`text` with what stands between each `<!-- NAME -->` and `<!-- /NAME -->` replaced."""
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda m, block=block: f"{m[1]}\n{block}\n\n{m[2]}", text)
    return text


def main(arguments: list[str]) -> None:
    blocks = {"compiled": compiled_table(compile_all()), "predicted": predicted_table()}
    for name in arguments:
        path = Path(name)
        path.write_text(fill(path.read_text(), blocks))
    if not arguments:
        sys.stdout.write("\n\n".join(blocks.values()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
