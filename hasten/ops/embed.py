"""From token ids to vectors: what the tables of an embedding hold for a token, its position and its type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.table import op_by_rows
from hasten.parallel import Group
from hasten.spec import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class EmbedLayer:
    """The tables (rows, width) of an embedding beside its description; None: nothing of that kind is added."""

    spec: Tokens
    tokens: Tensor
    positions: Tensor | None = None
    types: Tensor | None = None

    @property
    def scale(self) -> float:
        """What multiplies a token's vector."""
        s = self.spec
        return torch.tensor(s.scale, dtype=self.tokens.dtype).item() if s.scale_rounded else s.scale


@op_by_rows
def embed(ids: Tensor, positions: Tensor | None, types: Tensor | None, e: EmbedLayer) -> Tensor:
    """Integer ids (...) to (..., width) in the dtype of the token table: scale * token [+ type] [+ position].

    positions and types: integers that broadcast to ids, needed where there is a table; without types all are of type 0.
    On a GPU an id that the table lacks becomes a row of NaN, so that work may be handed over before ids are checked;
    elsewhere it raises.
    """
    x = _tokens(ids, e.tokens)
    return placed(x if e.scale == 1.0 else x * e.scale, positions, types, e)


def _tokens(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of the table. What torch's own kernel does about a missing one ends the process's use of the GPU."""
    if not ids.is_cuda:
        return F.embedding(ids, table)
    near = ids.clamp(0, len(table) - 1)
    return F.embedding(near, table).masked_fill((near != ids).unsqueeze(-1), float("nan"))


def embed_over(ids: Tensor, positions: Tensor | None, types: Tensor | None, e: EmbedLayer, group: Group) -> Tensor:
    """`embed` with a table of tokens that the ranks divide: each has as many rows, the first of them rank 0."""
    rows = len(e.tokens)
    missing = (ids < 0) | (ids >= e.spec.vocab)
    if not ids.is_cuda and missing.any():  # on every rank, in front of the exchange
        raise IndexError(f"token ids outside of 0 to {e.spec.vocab - 1}")
    near = ids - group.rank * rows
    elsewhere = (near < 0) | (near >= rows)
    x = F.embedding(near.clamp(0, rows - 1), e.tokens).masked_fill(elsewhere.unsqueeze(-1), 0.0)
    x = group.all_reduce(x)
    if ids.is_cuda:
        x = x.masked_fill(missing.unsqueeze(-1), float("nan"))
    return placed(x if e.scale == 1.0 else x * e.scale, positions, types, e)


def placed(x: Tensor, positions: Tensor | None, types: Tensor | None, e: EmbedLayer) -> Tensor:
    """x (..., width) and what the tables hold for its types and positions."""
    if e.types is not None:
        x = x + (e.types[0] if types is None else F.embedding(types, e.types))
    if e.positions is not None:
        assert positions is not None, "a table of positions needs positions"
        x = x + F.embedding(positions + e.spec.position_offset, e.positions).to(x.dtype)
    return x
