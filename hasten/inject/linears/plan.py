"""How the modules of a model without a family are divided among ranks, as a value.

A rank holds a part of some parameters; what its linears then give is either a part of the features, which the next
matrix takes in the same parts, or a summand. A plan says which parameters are cut, where ranks exchange something, and
which integers on modules count what a rank holds. Everything else is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["rows", "rows of whole", "gather", "sum"]
"""What happens where ranks meet.

rows: a linear takes a rank's features, and its products are summed; rows of whole: so, of features that every rank has
all of; gather: a linear gives a rank's features, which are put side by side; sum: what a module gives is summed.
"""


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter that lies in equal runs along an axis; a rank holds its equal part of every run.

    parts: 1, or how many runs there are (2 of a gate beside an up matrix, 3 of query, key and value).
    """

    name: str
    axis: int
    parts: int = 1

    def fits(self, width: int, size: int) -> bool:
        return width % (self.parts * size) == 0

    def own(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """What a rank holds; a view where the parameter is one run."""
        runs = [run.chunk(size, self.axis)[rank] for run in whole.chunk(self.parts, self.axis)]
        return runs[0] if len(runs) == 1 else torch.cat(runs, self.axis)

    def join(self, shares: Sequence[Tensor]) -> Tensor:
        """The parameter, of what all ranks hold."""
        pieces = [share.chunk(self.parts, self.axis) for share in shares]
        return torch.cat([of_rank[run] for run in range(self.parts) for of_rank in pieces], self.axis)


@dataclass(frozen=True, slots=True)
class Seam:
    """A module in whose call ranks exchange something."""

    path: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Count:
    """An integer on all modules of a class, which counts what a rank holds a part of."""

    type: str
    name: str
    paths: tuple[str, ...]
    whole: int
    own: int

    def __str__(self) -> str:
        return f"{self.type}.{self.name} {self.whole} -> {self.own}"


@dataclass(frozen=True, slots=True)
class Plan:
    """source: who says so. size: of how many ranks. whole: linears that stay whole though the source divides them."""

    source: str
    size: int
    cuts: tuple[Cut, ...]
    seams: tuple[Seam, ...]
    counts: tuple[Count, ...]
    whole: tuple[str, ...]
