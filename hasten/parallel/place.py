"""Where one process stands among those that hold a model together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hasten.parallel.group import Chain, Group
from hasten.parallel.joint import Joint


@dataclass(frozen=True, slots=True)
class Place:
    """tensor: the processes that split every layer between them. stages: those that hold layers one after the other.

    None: this process does so alone. Every process of `tensor` is in other `stages`, at the same place in them.
    """

    tensor: Group | None = None
    stages: Chain | None = None

    @property
    def over(self) -> Group | None:
        """The processes with which this one has to exchange what its share of a layer gives."""
        return self.tensor if self.tensor is not None and self.tensor.size > 1 else None

    @property
    def chain(self) -> Chain | None:
        """The processes that have the layers in front and behind."""
        return self.stages if self.stages is not None and self.stages.size > 1 else None

    @property
    def everyone(self) -> Group | None:
        """All that hold the model together, stage by stage."""
        over, chain = self.over, self.chain
        return Joint(over, chain) if over is not None and chain is not None else over or chain

    @property
    def first(self) -> bool:
        """Whether the embedding is here."""
        return self.chain is None or self.chain.rank == 0

    @property
    def last(self) -> bool:
        """Whether what follows the last block is here."""
        return self.chain is None or self.chain.rank == self.chain.size - 1

    def own(self, t: Tensor, axis: int) -> Tensor:
        """This process's part of an axis that the processes of `tensor` divide evenly, such as the heads."""
        return t if self.tensor is None else t.chunk(self.tensor.size, axis)[self.tensor.rank]


ALONE = Place()
