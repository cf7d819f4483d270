"""How tensor-parallel ranks cut each tensor of Megatron: by its plain name alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from hasten.checkpoints.joining import Share, Whole, along, first, unequal

ROWS = re.compile(r"^(embedding\.word_embeddings|final_linear)\.weight$|^output_layer\.|\.linear_(qkv|fc1)\.")
COLUMNS = re.compile(r"\.linear_(proj|fc2)\.weight$")
QKV = re.compile(r"\.linear_qkv\.")
UP = re.compile(r"\.linear_fc1\.")


def axis(name: str) -> int | None:
    """The axis along which ranks cut the tensor; None where each has all of it."""
    return 0 if ROWS.search(name) else 1 if COLUMNS.search(name) else None


def join(name: str, shares: Sequence[Share], version: int, shapes: Mapping[str, tuple[int, ...]]) -> Whole:
    """The whole tensor, its rows in the order of the version.

    shapes: of the tensors of one rank, which tell whether a layer's linear_fc1 is two, [gate | up]: it has twice the
    rows that linear_fc2 has columns. ValueError where shares do not go together.
    """
    at = axis(name)
    if different := unequal(shares, at):
        raise ValueError(f"the ranks' shares of {name} do not go together: {different}")
    if at is None or len(shares) == 1:
        return first(shares)
    if QKV.search(name):
        # version 0 has all of a rank's queries, then its keys, then its values; later ones go head by head
        return along(0, shares, (1, 1, 1) if version == 0 else (1,))
    return along(at, shares, (1, 1) if UP.search(name) and _gated(name, shapes) else (1,))


def _gated(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    down = shapes.get(UP.sub(".linear_fc2.", name).removesuffix(".bias").removesuffix(".weight") + ".weight", (0, 0))
    return shapes[name][0] == 2 * down[-1]
