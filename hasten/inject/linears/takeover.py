"""A live model whose linears several ranks hold together, for as long as `install` and `remove` say."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import nn

from hasten.checkpoints.split import Cut
from hasten.errors import UnsupportedModel
from hasten.inject.cast import Cast
from hasten.inject.joining import Division, in_step
from hasten.inject.linears.divided import Meeting, Share
from hasten.inject.linears.source import Found
from hasten.inject.linears.trial import Trial


class Linears:
    """Every module stays where it is; parameters become a rank's, and forwards at seams exchange what they give."""

    def __init__(self, model: nn.Module, found: Found, division: Division) -> None:
        self.model, self.found, self.plan, self.division = model, found, found.plan, division
        self.modules = dict(model.named_modules())
        self.shares = [
            Share(self.modules[path], [*cuts], division.group)
            for path, cuts in groupby(self.plan.cuts, lambda c: c.name.rpartition(".")[0])
        ]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._apart = frozenset(id(parameters[c.name]) for c in self.plan.cuts)
        self.meetings = {s.path: Meeting(self.modules[s.path], s.kind, division.group) for s in self.plan.seams}
        self._move: Cast | None = None

    def install(self) -> None:
        """Divide the model, which is whole and in its dtype, and compare; UnsupportedModel if it answers otherwise.

        If anything fails the model is as it was.
        """
        d = self.division
        where = d.device or next(self.model.parameters()).device
        try:
            with in_step(d.group, where, "taking a share of the model"):
                trial = self._trial()
                self._divide()
            for m in self.meetings.values():
                m.install()
            self._agree(trial.failure(self.meetings))
        except BaseException:
            self.remove()
            raise
        for share in self.shares:
            share.settle()

    def _trial(self) -> Trial:
        """What the whole model answers."""
        try:
            return Trial(self.model, self.plan, self.found.probes)
        except Exception as error:
            kinds = ", ".join(sorted({f"{p.dtype} on {p.device}" for p in self.model.parameters()}))
            raise UnsupportedModel(
                f"{type(self.model).__name__} does not run whole ({kinds}), so that nothing can be compared: {error}"
            ) from error

    def _divide(self) -> None:
        for share in self.shares:
            share.install(self.division.device)
        self._move = Cast(self.model, None, self.division.device, keep=False, apart=self._apart)
        self._move.apply()
        self._count(own=True)

    def remove(self) -> None:
        """The model as it was; once it is installed, all ranks have to call this."""
        for m in self.meetings.values():
            m.remove()
        self._count(own=False)
        for share in self.shares:
            share.undo()
        if self._move is not None:
            self._move.undo()
            self._move = None

    @property
    def stored(self) -> dict[str, Cut]:
        """How a checkpoint that ranks share cuts the parameters."""
        return {c.name: Cut(c.axis, (1,) * c.parts) for c in self.plan.cuts}

    @property
    def bytes(self) -> int:
        """Of the parameters on this rank."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def _count(self, own: bool) -> None:
        for n in self.plan.counts:
            for path in n.paths:
                setattr(self.modules[path], n.name, n.own if own else n.whole)

    def _agree(self, failure: str | None) -> None:
        """Raise where any rank has found a difference."""
        group = self.division.group
        first = next(self.model.parameters())
        heard = group.all_gather(torch.tensor([int(failure is not None)], device=first.device)).tolist()
        if any(heard):
            said = failure or "as the errors there say"
            raise UnsupportedModel(
                f"{type(self.model).__name__}, divided among {group.size} ranks by {self.plan.source}, answers "
                f"otherwise than whole on rank {', '.join(str(r) for r, bad in enumerate(heard) if bad)}: {said}"
            )
