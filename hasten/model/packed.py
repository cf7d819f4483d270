"""Sequences end to end, without the padding that made them a rectangle."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hasten import ops
from hasten.model.context import KeysAndValues
from hasten.ops import Reach, Slots
from hasten.spec import Attention, Dynamic, LongRope, Rope, Tower


def packable(t: Tower) -> bool:
    """Whether every token needs to know no more than its position and its sequence."""

    def alone(a: Attention) -> bool:
        return (a.position is None or isinstance(a.position, Rope)) and a.window is None

    return all(alone(b.attention) and b.cross is None for b in t.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Which tokens of a rectangle (batch, tokens) are real.

    index (rows,) int64: where in the flat rectangle each row comes from; behind the real ones, copies of its first.
    starts (sequences + 1,) int32: the rows of each sequence; the last sequence is the copies.
    """

    index: Tensor
    starts: Tensor
    real: int

    def pack(self, x: Tensor) -> Tensor:
        """(batch or 1, tokens, ...) of every token to (rows, ...)."""
        return x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, rows: Tensor, batch: int, tokens: int) -> Tensor:
        """(rows, ...) back to (batch, tokens, ...): zeros where there was padding."""
        flat = rows.new_zeros(batch * tokens, *rows.shape[1:])
        return flat.index_copy_(0, self.index[: self.real], rows[: self.real]).unflatten(0, (batch, tokens))


def packing(seen: Tensor, step: int = 1) -> Packing:
    """The packing of seen (batch, tokens), True where real. The count of rows is rounded up to a multiple of `step`.

    It waits for the device: how many rows there are decides how large everything is.
    """
    real = seen.flatten().nonzero().squeeze(-1)
    count = len(real)
    rows = -(-count // step) * step
    starts = F.pad(seen.sum(1).cumsum(0), (1, 1), value=0)
    starts[-1] = rows
    index = F.pad(real, (0, rows - count), value=0)
    return Packing(index, starts.int(), count)


class Packed:
    """A context of tokens (rows,) whose sequences lie at starts[r] to starts[r + 1], each seeing itself alone."""

    def __init__(self, positions: Tensor, starts: Tensor) -> None:
        self.positions, self.starts = positions, starts
        self._turns: dict[Rope, tuple[Tensor, Tensor]] = {}

    def turn(self, r: Rope) -> tuple[Tensor, Tensor]:
        if r not in self._turns:
            grows = isinstance(r.scaling, Dynamic | LongRope)  # only these need the length, which costs a sync
            length = int(self.positions.max()) + 1 if grows else 0
            self._turns[r] = ops.rope_table(r, self.positions, length)
        return self._turns[r]

    def slots(self, i: int) -> Slots | None:
        return None

    def reach(self, a: Attention) -> Reach | None:
        return None

    def attend(
        self, i: int, a: Attention, q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        assert k is not None and v is not None, "packed rows have no slots"
        return ops.attend_packed(q, k, v, self.starts, a, sinks)

    def attend_memory(self, i: int, a: Attention, q: Tensor, make: KeysAndValues) -> Tensor:
        raise NotImplementedError("packed rows attend to themselves alone")
