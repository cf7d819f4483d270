"""A rectangular batch cut into runs of rows that go through the blocks one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.model.context import Dense, Store
from hasten.spec import Rope

ENOUGH = 64
"""Tokens of a piece: with fewer, what it costs is the weights that every piece reads again."""


@dataclass(frozen=True, slots=True)
class Piece:
    rows: slice
    ctx: Dense


@dataclass(frozen=True, slots=True)
class Pieces:
    """`each` goes through the blocks, and then `keep` puts what they would have kept where it belongs."""

    each: list[Piece]
    store: Store | None

    def keep(self) -> None:
        if self.store is None:
            return
        parts: list[Any] = [piece.ctx.store for piece in self.each]
        for i in parts[0].made:
            self.store.update(i, *(torch.cat(both) for both in zip(*(p.made[i] for p in parts), strict=True)))
        for i in parts[0].remembered:
            joined = tuple(torch.cat(both) for both in zip(*(p.remembered[i] for p in parts), strict=True))
            self.store.remember(i, lambda both=joined: both)  # pyright: ignore[reportArgumentType]


def pieces(ctx: Dense, batch: int, count: int) -> Pieces | None:
    """The batch in as many pieces as asked for, or as are worth it; None where it has to stay together.

    A store appends to all rows at once. So its rows can come one after the other only where it is empty, and where
    nobody has made a mask for what it would give.
    """
    count = min(count, batch, batch * ctx.positions.shape[-1] // ENOUGH)
    if count < 2 or (ctx.store is not None and (ctx.past or ctx.masks)):
        return None
    ends = [batch * k // count for k in range(count + 1)]
    cuts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return Pieces([Piece(rows, Rows(ctx, rows)) for rows in cuts], ctx.store)


class Rows(Dense):
    """Some rows of a batch. Rotations are the whole batch's, whose longest row may decide them."""

    def __init__(self, whole: Dense, rows: slice) -> None:
        def own(t: Tensor | None) -> Any:
            return t if t is None or len(t) == 1 else t[rows]

        biases, masks = whole.biases, whole.masks
        super().__init__(
            own(whole.positions),
            past=whole.past,
            seen=own(whole.seen),
            masks=None if masks is None else {window: own(mask) for window, mask in masks.items()},
            store=None if whole.store is None else First(),
            memory=own(whole.memory),
            memory_seen=own(whole.memory_seen),
            buckets=whole.buckets,
            biases=None if biases is None else lambda i: own(biases(i)),
        )
        self._turned: Callable[[Rope], tuple[Tensor, Tensor]] = lambda r: tuple(map(own, whole.turn(r)))  # pyright: ignore

    def turn(self, r: Rope) -> tuple[Tensor, Tensor]:
        if r not in self._made:
            self._made[r] = self._turned(r)
        return self._made[r]  # pyright: ignore[reportReturnType]


class First:
    """hasten.model.context.Store of the first tokens of some rows: what they look back at is themselves."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        self.remembered: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        self.made[i] = k, v
        return k, v, 0

    def remember(self, i: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        self.remembered[i] = make()
        return self.remembered[i]
