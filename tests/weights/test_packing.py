"""Packings are inverse to each other, and mean what the formats that they come from mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hasten.weights import BLOCKED, GROUPED, SEQUENTIAL, STRIDED, Packing

ANY = st.sampled_from((SEQUENTIAL, GROUPED, STRIDED, BLOCKED))


@st.composite
def packed(draw: st.DrawFn) -> tuple[Packing, Tensor, tuple[int, ...], int]:
    """A packing, distinct rows that it can hold, the parts' sizes, and the unit."""
    packing, unit = draw(ANY), draw(st.integers(1, 5))
    groups = draw(st.integers(1, 4))
    match packing.name:
        case "grouped":
            sizes = (draw(st.integers(1, 3)) * groups * unit, groups * unit, groups * unit)
        case "strided":
            sizes = (groups * unit,) * draw(st.integers(1, 4))
        case "blocked":
            sizes = (4 * groups * unit,) * 3
        case _:
            sizes = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    columns = draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    shape = (sum(sizes), *columns)
    return packing, torch.arange(torch.Size(shape).numel()).reshape(shape), sizes, unit


@given(packed())
def test_unpack_and_pack_undo_each_other(case: tuple[Packing, Tensor, tuple[int, ...], int]) -> None:
    packing, t, sizes, unit = case
    assert torch.equal(packing.pack(packing.unpack(t, sizes, unit), sizes, unit), t)
    assert torch.equal(packing.unpack(packing.pack(t, sizes, unit), sizes, unit), t)


@given(packed())
def test_rows_move_whole_and_none_is_lost(case: tuple[Packing, Tensor, tuple[int, ...], int]) -> None:
    packing, t, sizes, unit = case
    rows = [r.tolist() for r in packing.unpack(t, sizes, unit)]
    assert sorted(map(str, rows)) == sorted(str(r.tolist()) for r in t)


@given(packed())
def test_a_tensor_that_is_not_contiguous_is_packed_alike(case: tuple[Packing, Tensor, tuple[int, ...], int]) -> None:
    packing, t, sizes, unit = case
    apart = torch.stack((t, t), -1)[..., 0]
    assert torch.equal(packing.unpack(apart, sizes, unit), packing.unpack(t, sizes, unit))


# what each row of the stored tensor is: letter, head, row of the head
MEANINGS = {
    "sequential": (SEQUENTIAL, "q00 q01 q10 q11 k00 k01 k10 k11 v00 v01 v10 v11"),
    "grouped, one query head each": (GROUPED, "q00 q01 k00 k01 v00 v01 q10 q11 k10 k11 v10 v11"),
    "grouped, heads share keys": (GROUPED, "q00 q01 q10 q11 k00 k01 v00 v01 q20 q21 q30 q31 k10 k11 v10 v11"),
    "grouped, all heads share": (GROUPED, "q00 q01 q10 q11 q20 q21 k00 k01 v00 v01"),
    "strided": (STRIDED, "q00 k00 v00 q01 k01 v01 q10 k10 v10 q11 k11 v11"),
    "blocked": (
        BLOCKED,
        "q00 q01 v00 v01 k00 k01 q10 q11 v10 v11 k10 k11 q20 q21 v20 v21 k20 k21 q30 q31 v30 v31 k30 k31",
    ),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_a_packing_means_what_its_format_means(name: str) -> None:
    packing, layout = MEANINGS[name]
    stored = layout.split()
    canonical = sorted(stored, key=lambda row: ("qkv".index(row[0]), row[1:]))
    sizes = tuple(sum(row[0] == letter for row in stored) for letter in "qkv")
    t = torch.tensor([canonical.index(row) for row in stored])
    assert packing.unpack(t, sizes, 2).tolist() == list(range(len(stored)))
