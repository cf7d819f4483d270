"""Pages through the compiled kernels: one call attends for every new token, where each sequence has about one."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.ops.cpu.library import Library, load
from hasten.ops.cpu.native import NUMBERS, address, threads
from hasten.ops.pages import attend_pages, write_pages
from hasten.spec import Attention

MOST_DIM = 256


def steps(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor | None,
    lengths: Tensor,
    a: Attention,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> bool:
    """Whether there are as many new tokens as sequences, in the dtype of the pools, and nobody wants a gradient."""
    if not 0 < len(q) <= len(lengths) or q.dtype not in NUMBERS or keys.dtype != q.dtype or values.dtype != q.dtype:
        return False
    plain = q.stride(2) == 1 and keys.is_contiguous() and values.is_contiguous() and q.shape[2] <= MOST_DIM
    return plain and (sinks is None or sinks.dtype == q.dtype) and not (torch.is_grad_enabled() and q.requires_grad)


def rows(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> bool:
    """Whether tokens are bytes to be moved."""
    return k.dtype == keys.dtype and v.dtype == values.dtype and keys.is_contiguous() and values.is_contiguous()


def whole(t: Tensor) -> Tensor:
    """Integers as the library reads them."""
    return t if t.dtype == torch.int64 and t.is_contiguous() else t.long().contiguous()


def one_piece(t: Tensor) -> Tensor:
    """(tokens, heads, dim) whose tokens are without gaps inside; between them there may be some."""
    _, heads, dim = t.shape
    return t if t.stride(2) == 1 and (heads == 1 or t.stride(1) == dim) else t.contiguous()


def attend_steps(
    native: Library,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor | None,
    lengths: Tensor,
    a: Attention,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """`attend_pages`, by the library."""
    tokens, heads, dim = q.shape
    y = q.new_empty(q.shape)
    tables, lengths = whole(tables), whole(lengths)
    starts = None if starts is None else whole(starts)
    slopes = None if slopes is None else slopes.float().contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    native.attend(
        *(native.level, threads(), NUMBERS[q.dtype], tokens, len(lengths), heads, keys.shape[2], dim),
        *(q.data_ptr(), q.stride(0), q.stride(1), keys.data_ptr(), values.data_ptr(), keys.shape[1]),
        *(tables.data_ptr(), tables.shape[1], address(starts), lengths.data_ptr()),
        *(a.scale, a.softcap or 0.0, a.window or 0, address(slopes), address(sinks), y.data_ptr()),
    )
    return y


def write_rows(native: Library, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """`write_pages`, by the library."""
    k, v, slots = one_piece(k), one_piece(v), whole(slots)
    size, row = k.element_size(), k.shape[1] * k.shape[2]
    native.write(
        *(len(k), row * size, k.data_ptr(), k.stride(0) * size, v.data_ptr(), v.stride(0) * size),
        *(keys.data_ptr(), values.data_ptr(), slots.data_ptr()),
    )


def register(native: Library) -> None:
    """Put the kernels in front of what the table has already."""

    @attend_pages.register("native", devices="cpu", accepts=steps)
    def _(
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        starts: Tensor | None,
        lengths: Tensor,
        a: Attention,
        slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        return attend_steps(native, q, keys, values, tables, starts, lengths, a, slopes, sinks)

    @write_pages.register("native", devices="cpu", accepts=rows)
    def _(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        write_rows(native, k, v, keys, values, slots)


if isinstance(found := load(), Library):
    register(found)
