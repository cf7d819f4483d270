"""List the model types that Hasten describes.

The table comes from the families themselves; docs/models.md is `hasten models --markdown`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from hasten.families import FAMILIES, Family

KINDS = {
    "decoder": "decoder",
    "encoder": "encoder",
    "seq2seq-encoder": "encoder-decoder",
    "seq2seq-decoder": "encoder-decoder",
    "image": "vision",
    "audio": "speech",
    "megatron": "Megatron module",
}


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--markdown", action="store_true", help="as a Markdown table")


def run(args: argparse.Namespace) -> int:
    print("\n".join(table(args.markdown)))
    return 0


def table(markdown: bool) -> Iterator[str]:
    """A line for each model type, sorted, under a heading."""
    rows = [(name, kind(f), f.classes) for name, f in sorted(FAMILIES.items())]
    if markdown:
        yield from ("| model type | kind | known as |", "| --- | --- | --- |")
        yield from (f"| `{a}` | {b} | {c} |" for a, b, c in rows)
        return
    widths = [max(len(r[i]) for r in rows) for i in (0, 1)]
    yield from (f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)
    yield f"{len(rows)} model types"


def kind(f: Family) -> str:
    """What a family's towers make together."""
    kinds = dict.fromkeys(KINDS[s.kind] for s in f.seams.values())
    return " and ".join(k for k in kinds if not (k == "encoder-decoder" and "speech" in kinds))
