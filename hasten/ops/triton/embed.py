"""Token ids to the first hidden state, one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.embed import EmbedLayer, embed
from hasten.ops.triton.arrange import cdiv, on, power_of_2, served
from hasten.ops.triton.launch import dependent, go, wait


@triton.jit
def look_up(table, rows, row, i, inside, table_row):
    """Columns i of a row; NaN where the table has no such row, since a kernel cannot raise."""
    known = (row >= 0) & (row < rows)
    start = tl.where(known, row, 0).to(tl.int64) * table_row
    return tl.where(known, tl.load(table + start + i, mask=inside, other=0.0).to(tl.float32), float("nan"))


@triton.jit(do_not_specialize=("ids", "positions", "types"))
def embed_rows(
    ids,
    positions,
    types,
    token_table,
    position_table,
    type_table,
    out,
    token_rows,
    position_rows,
    type_rows,
    width,
    token_row,
    position_row,
    type_row,
    offset,
    scale,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    go(PDL)
    blocks = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    wait(PDL)
    kind = out.dtype.element_ty  # every sum is rounded to it, as torch rounds
    y = look_up(token_table, token_rows, tl.load(ids + token), i, inside, token_row)
    if SCALED:
        y = (y * scale).to(kind).to(tl.float32)
    if type_table is not None:
        at = 0
        if types is not None:
            at = tl.load(types + token)
        y = (y + look_up(type_table, type_rows, at, i, inside, type_row)).to(kind).to(tl.float32)
    if position_table is not None:
        at = tl.load(positions + token) + offset
        y += look_up(position_table, position_rows, at, i, inside, position_row).to(kind).to(tl.float32)
    tl.store(out + token * width + i, y.to(kind), mask=inside)


@dataclass(frozen=True, slots=True)
class EmbedLaunch:
    block: int
    warps: int


@lru_cache(1024)
def embed_launch(width: int) -> EmbedLaunch:
    """Eight elements a thread, one 16-byte load of 16-bit numbers; wide rows are shared by several programs."""
    block = min(max(power_of_2(width), 256), 1024)
    return EmbedLaunch(block=block, warps=block // 256)


def _accepts(ids: Tensor, positions: Tensor | None, types: Tensor | None, e: EmbedLayer) -> bool:
    tables = [t for t in (e.tokens, e.positions, e.types) if t is not None]
    same = e.types is None or e.types.dtype == e.tokens.dtype
    return same and all(t.stride(-1) == 1 for t in tables) and served(*tables)


def _spread(x: Tensor | None, ids: Tensor) -> Tensor | None:
    return None if x is None else x.expand(ids.shape).contiguous()


@embed.register("triton", devices="cuda", accepts=_accepts, invariant=True)
def _(ids: Tensor, positions: Tensor | None, types: Tensor | None, e: EmbedLayer) -> Tensor:
    width = e.tokens.shape[1]
    out = e.tokens.new_empty((*ids.shape, width))
    if not out.numel():
        return out
    assert e.positions is None or positions is not None, "a table of positions needs positions"
    shape, scale = embed_launch(width), e.scale
    with on(ids):
        embed_rows[(ids.numel() * cdiv(width, shape.block),)](
            ids.contiguous(),
            None if e.positions is None else _spread(positions, ids),
            None if e.types is None else _spread(types, ids),
            e.tokens,
            e.positions,
            e.types,
            out,
            *(0 if t is None else len(t) for t in (e.tokens, e.positions, e.types)),
            width,
            *(0 if t is None else t.stride(0) for t in (e.tokens, e.positions, e.types)),
            e.spec.position_offset,
            scale,
            SCALED=scale != 1.0,
            BLOCK=shape.block,
            num_warps=shape.warps,
            **dependent(ids.device),
        )
    return out
