"""Chosen tokens into the state that the next decode step reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.advance import advance
from hasten.ops.triton.arrange import cdiv, dense, on, power_of_2
from hasten.ops.triton.launch import dependent, go, wait
from hasten.ops.workspace import counters

INTEGERS = (torch.int32, torch.int64)


@triton.jit(
    do_not_specialize=(
        "tokens",
        "ids",
        "positions",
        "lengths",
        "slots",
        "tables",
        "said",
        "count",
        "rows",
        "pages",
        "steps",
        "table_row",
        "said_row",
    )
)
def advance_rows(
    tokens,
    ids,
    positions,
    lengths,
    slots,
    tables,
    said,
    count,
    arrived,
    rows,
    pages,
    steps,
    table_row,
    said_row,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    go(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    # this kernel alone writes these, at the end of a step, so they may be read before the others of the step have ended
    length = tl.load(lengths + row, mask=inside, other=0)
    position = tl.load(positions + row, mask=inside, other=0) + 1
    step = tl.load(count)
    live = inside & (length > 0)
    column = position // PAGE
    there = live & (column < pages)
    page = tl.load(tables + row.to(tl.int64) * table_row + column, mask=there, other=-1).to(tl.int64)
    slot = tl.where(page >= 0, page * PAGE + position % PAGE, -1)
    wait(PDL)
    token = tl.load(tokens + row, mask=live, other=-1)
    tl.store(said + step.to(tl.int64) * said_row + row, token, mask=inside & (step < steps))
    tl.store(ids + row, tl.maximum(token, 0), mask=live)
    tl.store(positions + row, position, mask=live)
    tl.store(lengths + row, length + 1, mask=live)
    tl.store(slots + row, slot, mask=live)
    tl.debug_barrier()  # every thread has read the count before it is written, or this program counted in
    last = True
    if arrived is not None:
        last = tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(count, step + 1)
        if arrived is not None:
            tl.store(arrived, 0)


@dataclass(frozen=True, slots=True)
class AdvanceLaunch:
    block: int
    programs: int
    warps: int


@lru_cache(1024)
def advance_launch(rows: int) -> AdvanceLaunch:
    """One program, a row a thread, as long as that fits."""
    block = min(max(power_of_2(rows), 32), 1024)
    return AdvanceLaunch(block=block, programs=cdiv(rows, block), warps=block // 32)


def _accepts(
    tokens: Tensor,
    ids: Tensor,
    positions: Tensor,
    lengths: Tensor,
    slots: Tensor,
    tables: Tensor,
    page_size: int,
    said: Tensor,
    count: Tensor,
) -> bool:
    written = all(t.is_contiguous() for t in (ids, positions, lengths, slots)) and said.stride(-1) == 1
    return written and all(t.dtype in INTEGERS for t in (tokens, ids, positions, lengths, slots, tables, said, count))


@advance.register("triton", devices="cuda", accepts=_accepts, invariant=True)
def _(
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
    rows, tables = len(tokens), dense(tables)
    shape = advance_launch(max(rows, 1))
    with on(tokens):
        advance_rows[(shape.programs,)](
            tokens.contiguous(),
            ids,
            positions,
            lengths,
            slots,
            tables,
            said,
            count,
            counters(1, tokens.device) if shape.programs > 1 else None,
            rows,
            tables.shape[1],
            len(said),
            tables.stride(0),
            said.stride(0),
            PAGE=page_size,
            BLOCK=shape.block,
            num_warps=shape.warps,
            **dependent(tokens.device),
        )
