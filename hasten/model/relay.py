"""Hidden states on their way through stages, each of which holds some of the blocks.

A batch goes in pieces, so that a stage is at work on one while the next is at work on the one before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.model.context import Context, Dense
from hasten.model.pieces import pieces
from hasten.parallel import Chain, exchanged

Watch = Callable[[int, Tensor], None]
Through = Callable[[Tensor, Context, Watch | None], Tensor]


def relayed(through: Through, chain: Chain, x: Tensor, ctx: Context, watch: Watch | None) -> Tensor:
    """What the last stage's blocks give, on every stage; x, of which the first stage's counts, has its shape.

    through: the blocks that are here. `watch` sees what goes into any stage's blocks, one after the other.
    """
    if watch is not None:
        return _watched(through, chain, x, ctx, watch)
    split = pieces(ctx, len(x), chain.size) if isinstance(ctx, Dense) else None
    parts = [(x, ctx)] if split is None else [(x[own.rows], own.ctx) for own in split.each]
    sent, made = [], []
    for h, own in parts:
        h = _step(through, chain, h, own, None)
        if chain.rank + 1 < chain.size:
            sent.append(chain.send(h, chain.rank + 1))
        made.append(h)
    if split is not None:
        split.keep()
    last = exchanged(torch.cat(made) if len(made) > 1 else made[0], lambda h: _told(chain, h))
    for leaving in sent:
        leaving.wait()
    return last


def _told(chain: Chain, h: Tensor) -> Tensor:
    return chain.broadcast(h, chain.size - 1).wait()


def _step(through: Through, chain: Chain, x: Tensor, ctx: Context, watch: Watch | None) -> Tensor:
    x = chain.receive(x, chain.rank - 1) if chain.rank else x
    return through(x, ctx, watch)


def _watched(through: Through, chain: Chain, x: Tensor, ctx: Context, watch: Watch) -> Tensor:
    """In one piece, and every stage tells the others what went into its blocks."""
    seen: list[Tensor] = []
    h = _step(through, chain, x, ctx, lambda i, state: seen.append(state))
    sent = chain.send(h, chain.rank + 1) if chain.rank + 1 < chain.size else None
    counts = chain.all_gather(torch.tensor([len(seen)], device=x.device)).tolist()
    places = [(stage, k) for stage, count in enumerate(counts) for k in range(count)]
    for i, (stage, k) in enumerate(places):
        watch(i, chain.broadcast(seen[k] if stage == chain.rank else x, stage).wait())
    last = exchanged(h, lambda h: _told(chain, h))
    if sent is not None:
        sent.wait()
    return last
