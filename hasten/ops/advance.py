"""The end of a decode step: what was chosen becomes the input of the next one."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.ops.table import op_by_rows


@op_by_rows
def advance(
    tokens: Tensor,
    ids: Tensor,
    positions: Tensor,
    lengths: Tensor,
    slots: Tensor,
    tables: Tensor,
    page_size: int,
    said: Tensor,
    count: Tensor,
) -> None:
    """Write tokens int64 (rows,) down, said[count, row], and move every row on by one, in place.

    ids and positions (rows,): of the token that goes through the model next; id 0 where it is -1. lengths int32
    (rows,): tokens of the row once it has gone; a row of length 0 is padding: it stays as it is and says -1. slots
    int64 (rows,): where its key goes, by tables int32 (rows, pages); -1, nowhere, behind the last page or where the
    table's entry is negative. said int64 (steps, rows). count int32 (1,), less than steps, grows by one.
    """
    live = lengths > 0
    said.index_copy_(0, count.long(), torch.where(live, tokens, -1).unsqueeze(0))
    ids.copy_(torch.where(live, tokens.clamp(min=0), ids))
    positions.add_(live)
    lengths.add_(live)
    column = torch.div(positions, page_size, rounding_mode="floor").long()
    page = tables.gather(1, column.clamp(max=tables.shape[1] - 1).unsqueeze(1)).squeeze(1)
    there = (column < tables.shape[1]) & (page >= 0)
    slot = torch.where(there, page.long() * page_size + positions % page_size, -1)
    slots.copy_(torch.where(live, slot, slots))
    count.add_(1)
