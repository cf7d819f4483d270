"""Blocks of every order over pages, with the context that a step needs: a value, so that cases convert like others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten.model.context import KeysAndValues
from hasten.model.layer import layer
from hasten.model.stack import Stack
from hasten.ops import Reach, Slots, alibi_slopes, attend_pages, rope_table
from hasten.spec import Alibi, Attention, Block, Head, Mlp, Norm, Rope, Tokens, Tower
from hasten.weights import params
from tests.ops.arguments import Maker, random, strided


@dataclass(frozen=True, eq=False)
class Steps:
    """hasten.model.Context of new tokens over pages."""

    positions: Tensor
    pools: tuple[tuple[Tensor, Tensor], ...]
    where: Tensor
    tables: Tensor
    starts: Tensor | None
    lengths: Tensor

    def turn(self, r: Rope) -> tuple[Tensor, Tensor]:
        return rope_table(r, self.positions, 0)

    def slots(self, i: int) -> Slots:
        return Slots(*self.pools[i], self.where)

    def reach(self, a: Attention) -> Reach | None:
        slopes = alibi_slopes(a.position, a.heads) if isinstance(a.position, Alibi) else None
        return Reach(self.tables, self.starts, self.lengths, slopes)

    def attend(
        self, i: int, a: Attention, q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        slopes = alibi_slopes(a.position, a.heads) if isinstance(a.position, Alibi) else None
        return attend_pages(q, *self.pools[i], self.tables, self.starts, self.lengths, a, slopes, sinks)

    def attend_memory(self, i: int, a: Attention, q: Tensor, make: KeysAndValues) -> Tensor:
        raise NotImplementedError


def context(blocks: Sequence[Block], lengths: Sequence[int], new: Sequence[int], size: int, d: torch.dtype) -> Steps:
    """Sequences of these lengths, their newest tokens included, in pages of `size` tokens in any order."""
    most = max(-(-n // size) for n in lengths) + 1
    tables = torch.randperm(most * len(lengths)).view(len(lengths), most)
    shapes = [(tables.numel(), size, b.attention.kv_heads, b.attention.head_dim) for b in blocks]
    pools = tuple((random(*s, dtype=d), random(*s, dtype=d)) for s in shapes)
    runs = [(r, at) for r, (n, k) in enumerate(zip(lengths, new, strict=True)) for at in range(n - k, n)]
    slots = [int(tables[r, at // size]) * size + at % size for r, at in runs]
    starts = None if all(n == 1 for n in new) else torch.tensor((0, *new)).cumsum(0)
    return Steps(
        torch.tensor([at for _, at in runs], dtype=torch.int64),
        pools,
        torch.tensor(slots, dtype=torch.int64),
        tables,
        starts,
        torch.tensor(lengths),
    )


def layers(width: int, blocks: Sequence[Block], d: torch.dtype) -> Stack:
    """Blocks with random weights, whose products keep the size of their input."""
    t = Tower(width, Tokens(7, width), tuple(blocks), Norm("rms", 1e-6), Head(tied=True))
    made = {p.name: random(*p.shape, dtype=d, scale=p.shape[-1] ** -0.5) for p in params(t)}
    made |= {n: 1 - blocks[0].norm.offset + w for n, w in made.items() if n.endswith("norm.weight")}
    return Stack(tuple(layer(b, made, i) for i, b in enumerate(blocks)))


PLAIN = Block(
    Attention(4, 2, 8, 0.3, True, "qkvo", Rope(8, 1e4, "halves")), Mlp(36, "silu", True, True), Norm("rms", 1e-5), "pre"
)
LAYER_NORM = replace(PLAIN, norm=Norm("layer", 1e-5, True), mlp=Mlp(45, "gelu", False, True))


def stack_case(
    block: Block,
    d: torch.dtype,
    lengths: Sequence[int] = (9, 1, 30),
    new: Sequence[int] = (1, 1, 1),
    width: int = 32,
    gap: bool = False,
    rest: Block | None = None,
    **attention: Any,
) -> tuple[Any, ...]:
    block = replace(block, attention=replace(block.attention, **attention))
    blocks = (block, rest or block)
    x = random(sum(new), width, dtype=d)
    return strided(x) if gap else x, layers(width, blocks, d), context(blocks, lengths, new, 4, d)


def orders(block: Block, kind: str) -> dict[str, Maker]:
    names = ("pre", "post", "sandwich", "reordered", "parallel", "parallel-shared")
    return {f"{order}, {kind}": partial(stack_case, replace(block, order=order)) for order in names}


STACKS: dict[str, Maker] = {
    **orders(PLAIN, "rms"),
    **orders(LAYER_NORM, "layer"),
    "one token": partial(stack_case, PLAIN, lengths=(17,), new=(1,)),
    "prompts and steps": partial(stack_case, LAYER_NORM, lengths=(3, 9, 5), new=(2, 1, 1)),
    "more tokens than are few": partial(stack_case, PLAIN, lengths=(20,), new=(17,)),
    "nothing": partial(stack_case, PLAIN, lengths=(4,), new=(0,)),
    "a sequence without new tokens": partial(stack_case, PLAIN, lengths=(6, 5, 7), new=(2, 0, 1)),
    "strided": partial(stack_case, PLAIN, gap=True),
    "odd sizes": partial(stack_case, LAYER_NORM, width=37, heads=3, kv_heads=1, head_dim=10, position=None),
    "part of a head, neighbours": partial(stack_case, LAYER_NORM, position=Rope(4, 1e4, "neighbours")),
    "two bases": partial(
        stack_case, PLAIN, rest=replace(PLAIN, attention=replace(PLAIN.attention, position=Rope(6, 1e2, "halves")))
    ),
    "window": partial(stack_case, PLAIN, window=5, rest=PLAIN),
    "alibi": partial(stack_case, LAYER_NORM, position=Alibi()),
    "soft-cap": partial(stack_case, PLAIN, softcap=2.0),
    "sinks": partial(stack_case, PLAIN, sinks=True),
    "clip": partial(stack_case, PLAIN, clip=0.5),
    "q and k norms": partial(stack_case, PLAIN, qk_norm=Norm("rms", 1e-5)),
    "residuals scaled": partial(stack_case, replace(PLAIN, residual=0.4)),
    "weights mean one plus": partial(stack_case, replace(PLAIN, norm=Norm("rms", 1e-5, offset=1.0))),
}
