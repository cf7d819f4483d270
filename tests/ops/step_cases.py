"""Arguments for the two ends of a decode step: tokens in, state on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hasten.ops import EmbedLayer
from hasten.spec import Tokens
from tests.ops.arguments import Maker, random


def embed_case(
    shape: tuple[int, ...],
    d: torch.dtype,
    width: int = 37,
    positions: int | None = None,
    types: int = 0,
    typed: bool = False,
    integer: torch.dtype = torch.int64,
    **more: Any,
) -> tuple[Any, ...]:
    """Positions count along the last axis and broadcast; `typed`: types are given, not all 0."""
    e = Tokens(41, width, positions, types=types, **more)
    places = torch.arange(shape[-1], dtype=integer).expand((1,) * (len(shape) - 1) + shape[-1:])
    tables = (random(n, width, dtype=d) if n else None for n in (41, positions, types))
    given = torch.randint(types, shape, dtype=integer) if typed else None
    return torch.randint(41, shape, dtype=integer), places, given, EmbedLayer(e, *tables)


def apart(d: torch.dtype) -> tuple[Any, ...]:
    """Every second column of ids, tables whose rows lie apart, float32 positions beside them."""
    ids, places, given, e = embed_case((3, 8), d, positions=9, types=2, typed=True)
    tokens, kinds = (random(n, 50, dtype=d)[:, :37] for n in (41, 2))
    return ids[:, ::2], places[:, ::2], given[:, ::2], EmbedLayer(e.spec, tokens, torch.randn(9, 37), kinds)


EMBEDS: dict[str, Maker] = {
    "tokens": partial(embed_case, (2, 3)),
    "one token": partial(embed_case, (1,), width=64),
    "two programs a row, int32": partial(embed_case, (3,), width=1100, positions=3, integer=torch.int32),
    "scaled": partial(embed_case, (2, 3), scale=6.08),
    "scaled by a rounded number": partial(embed_case, (5,), scale=6.08, scale_rounded=True),
    "positions behind an offset": partial(embed_case, (2, 5), positions=7, position_offset=2),
    "types": partial(embed_case, (2, 5), positions=5, types=3, typed=True),
    "types that are not given": partial(embed_case, (2, 5), positions=5, types=3),
    "everything": partial(embed_case, (2, 4), positions=9, position_offset=1, types=2, typed=True, scale=0.3),
    "strided": apart,
    "empty": partial(embed_case, (2, 0), positions=5),
}


def advance_case(
    rows: int,
    d: torch.dtype,
    padding: tuple[int, ...] = (),
    page: int = 4,
    pages: int = 3,
    integer: torch.dtype = torch.int64,
    told: int = 1,
) -> tuple[Any, ...]:
    """Rows anywhere in their tables, the last token of one included; rows of `padding` have length 0 and no slot."""
    lengths = torch.randint(1, page * pages + 1, (rows,), dtype=torch.int32)
    lengths[:1] = page * pages
    lengths[list(padding)] = 0
    positions = (lengths - 1).clamp(min=0).to(integer)
    tables = torch.randperm(rows * pages).view(rows, pages).int()
    slots = torch.where(lengths > 0, torch.randint(99, (rows,)), -1)
    said, count = torch.full((3, rows), -7), torch.tensor([told], dtype=torch.int32)
    tokens, ids = torch.randint(1000, (2, rows))
    return tokens, ids.to(integer), positions, lengths, slots, tables, page, said, count


def unassigned(d: torch.dtype) -> tuple[Any, ...]:
    """Behind a sequence's last page its table says -1."""
    tokens, ids, positions, lengths, slots, tables, *rest = advance_case(5, d)
    tables[torch.arange(3) > (positions // 4).unsqueeze(1)] = -1
    return tokens, ids, positions, lengths, slots, tables, *rest


def nothing_chosen(d: torch.dtype) -> tuple[Any, ...]:
    """A row's logits were no numbers."""
    tokens, *rest = advance_case(3, d)
    tokens[1] = -1
    return tokens, *rest


ADVANCES: dict[str, Maker] = {
    "one row": partial(advance_case, 1),
    "several rows": partial(advance_case, 13),
    "padding": partial(advance_case, 6, padding=(2, 5)),
    "int32 ids and positions": partial(advance_case, 33, padding=(7,), integer=torch.int32),
    "the first step": partial(advance_case, 4, told=0),
    "no token": nothing_chosen,
    "pages that nobody has": unassigned,
    "more rows than a program has": partial(advance_case, 2500, padding=(3, 1024, 2499)),
}
