"""One of several stages that a pass goes through: hidden states come in and go out, and what the last one chooses is
told to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from hasten.model import Transformer
from hasten.model.context import Context
from hasten.parallel import Chain, Coming
from hasten.runtime.request import Chosen, Sampling
from hasten.runtime.sampler import Choosing, Sampler, most_wanted
from hasten.runtime.scheduler import Row
from hasten.runtime.scheduler import Sequence as Line
from hasten.spec import Tokens


class Relayed:
    """A pass of which other stages do a part: one new token at most of each row. moving: what has to leave this one."""

    steps = 1
    last = None  # no pass begins behind it before it is known what it says

    def __init__(self, lines: Sequence[Line], choosing: Callable[[], Choosing] | None, moving: list[Coming]) -> None:
        self.lines, self._choosing, self._moving = lines, choosing, moving
        self._chosen: list[Chosen] | None = None

    def tokens(self) -> list[list[int]]:
        return [[c.token] for c in self.scores()]

    def scores(self) -> list[Chosen]:
        if self._chosen is None:
            self._chosen = [] if self._choosing is None else self._choosing().chosen()
            for tensor in self._moving:
                tensor.wait()
        return self._chosen


class Stage:
    """This process's part of every pass. All stages begin the same passes in the same order."""

    def __init__(self, model: Transformer, chain: Chain, sampler: Sampler) -> None:
        self.model, self.chain, self._sampler = model, chain, sampler
        device = model.like.device
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def enter(self, x: Tensor) -> Tensor:
        """The hidden states that the stage in front has made, of x's shape; x itself on the first."""
        return x if self.model.place.first else self.chain.receive(x, self.chain.rank - 1)

    def leave(self, x: Tensor) -> list[Coming]:
        """Begin to hand them to the stage behind, if there is one."""
        return [] if self.model.place.last else [self.chain.send(x, self.chain.rank + 1)]

    def through(self, x: Tensor, ctx: Context) -> tuple[Tensor, list[Coming]]:
        """Hidden states through the blocks that are here, and on their way to the stage behind."""
        x = self.model.through(self.enter(x), ctx)
        return x, self.leave(x)

    def choose(self, x: Tensor, lines: Sequence[Line], moving: list[Coming]) -> Relayed:
        """The pass that says what follows x (lines, width), behind the last block."""
        if not lines:
            return Relayed(lines, None, moving)
        if self.model.place.last:
            return self.tell(self._sampler.choose(self.model.predict(x), lines), lines, moving)
        return self.hear(lines, moving)

    def recorded(
        self,
        rows: Sequence[Row],
        entering: Tensor | None,
        record: Callable[[], Tensor | None],
        chosen: Callable[[Tensor | None], Choosing],
    ) -> Relayed:
        """A pass of these rows whose launches a record has. Only real tokens go from stage to stage.

        entering: where the record reads hidden states, if it does. record: gives hidden states, or on the last stage
        what `chosen` makes tokens of.
        """
        lines, tokens = [row.sequence for row in rows if row.samples], sum(row.stop - row.start for row in rows)
        if entering is not None:
            entering[:tokens].copy_(self.enter(entering[:tokens]))
        made = record()
        if self.model.place.last:
            return self.tell(chosen(made), lines, []) if lines else Relayed(lines, None, [])
        assert made is not None, "this record ends at hidden states"
        moving = self.leave(made[:tokens].clone())  # the next pass is recorded into the same memory
        return self.hear(lines, moving) if lines else Relayed(lines, None, moving)

    def tell(self, made: Choosing, lines: Sequence[Line], moving: list[Coming]) -> Relayed:
        """The pass whose tokens were chosen here, which the other stages `hear`."""
        told = self.chain.broadcast(_packed(made), self.chain.rank)
        return Relayed(lines, lambda: made, [*moving, told])

    def hear(self, lines: Sequence[Line], moving: list[Coming]) -> Relayed:
        e, samplings = self.model.tower.embed, [line.request.sampling for line in lines]
        assert isinstance(e, Tokens), "the runner has refused other towers"
        most = most_wanted(samplings)
        columns = 1 if most is None else 2 + 2 * min(most, e.vocab)
        like = torch.empty(len(lines), columns, dtype=torch.float64, device=self.model.like.device)
        coming = self.chain.broadcast(like, self.chain.size - 1)
        return Relayed(lines, lambda: self._heard(samplings, coming), moving)

    def _heard(self, samplings: list[Sampling], coming: Coming) -> Choosing:
        """What the last stage has chosen, which does not wait for passes that have begun here meanwhile."""
        with nullcontext() if self._beside is None else torch.cuda.stream(self._beside):
            return _unpacked(samplings, coming.wait())


def _packed(made: Choosing) -> Tensor:
    """Tokens and scores side by side, float64 (lines, 1 or 2 + 2 * most), which holds all of them exactly."""
    columns = [made.tokens, *made.scores]
    return torch.cat([(t if t.ndim == 2 else t.unsqueeze(1)).double() for t in columns], 1)


def _unpacked(samplings: list[Sampling], packed: Tensor) -> Choosing:
    tokens, rest = packed[:, 0].long(), packed[:, 1:]
    if not rest.shape[1]:
        return Choosing(samplings, tokens, ())
    share, best, shares = rest.split([1, rest.shape[1] // 2, rest.shape[1] // 2], 1)
    return Choosing(samplings, tokens, (share.squeeze(1).float(), best.long(), shares.float()))
