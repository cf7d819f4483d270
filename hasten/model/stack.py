"""All blocks of a tower as one op, so that a backend may run a step through them in one call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hasten.model.block import block_between, first_norm
from hasten.model.context import Context
from hasten.model.layer import Layer
from hasten.ops.table import op_by_rows


@dataclass(frozen=True, eq=False)
class Stack:
    """The layers, and the identity under which a backend may keep what it made of them: a copy is another stack."""

    layers: tuple[Layer, ...]


@op_by_rows
def stack(x: Tensor, s: Stack, ctx: Context, rows: Tensor | None = None) -> Tensor:
    """Hidden states (..., width) through every block; rows as in `block`, of the last one."""
    last, normed = len(s.layers) - 1, None
    for i, (layer, then) in enumerate(zip(s.layers, (*map(first_norm, s.layers[1:]), None), strict=True)):
        x, normed = block_between(layer, i, x, normed, ctx, then, rows if i == last else None)
    return x
