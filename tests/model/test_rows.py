"""Rows that nobody asks for end at the last block's keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.model import block as block_module
from hasten.model.packed import Packed, packing
from tests.runtime.models import transformer
from tests.tiny import TINY, build


@pytest.mark.parametrize("name", ["llama", "gptj", "cohere", "mixtral", "gemma2", "opt"])
@pytest.mark.parametrize("watch", [None, lambda i, x: None], ids=["stack", "loop"])
def test_the_last_block_makes_the_rows_that_are_asked_for(
    name: str, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, p, rows = transformer(build(TINY[name])), packing(torch.ones(2, 6).bool()), torch.tensor([11, 0, 4])
    x, ctx = torch.randn(12, t.tower.width), Packed(p.pack(torch.arange(6).expand(2, 6)), p.starts)
    want = t.blocks(x, ctx)[rows]
    counts, project = list[int](), block_module._project

    def counted(y: torch.Tensor, *more: Any) -> torch.Tensor:
        counts.append(len(y))
        return project(y, *more)

    monkeypatch.setattr(block_module, "_project", counted)
    torch.testing.assert_close(t.blocks(x, ctx, watch, rows=rows), want, atol=1e-5, rtol=1e-5)
    assert counts[0] == 12 and counts[-1] == 3
