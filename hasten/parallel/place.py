"""Where one process stands among those that hold a model together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hasten.parallel.group import Group


@dataclass(frozen=True, slots=True)
class Place:
    """tensor: the processes that split every layer between them; None: this one has all of each."""

    tensor: Group | None = None

    @property
    def over(self) -> Group | None:
        """The processes with which this one has to exchange what its share of a layer gives."""
        return self.tensor if self.tensor is not None and self.tensor.size > 1 else None

    def own(self, t: Tensor, axis: int) -> Tensor:
        """This process's part of an axis that the processes of `tensor` divide evenly, such as the heads."""
        return t if self.tensor is None else t.chunk(self.tensor.size, axis)[self.tensor.rank]


ALONE = Place()
