"""Pools grow in place, keep what was in them, and know their limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.errors import RequestError
from hasten.runtime import Generator
from hasten.runtime import pools as pools_module
from hasten.runtime.pools import Pools, _group_memory, free_memory
from tests.runtime.models import llama

CPU = torch.device("cpu")


def pools(pages: int, dtype: torch.dtype = torch.float32) -> Pools:
    t = llama().tower
    return Pools(t, 4, dtype, CPU, pages * 4 * t.kv_width * dtype.itemsize + 3)


def test_growing_doubles_up_to_the_limit_and_keeps_the_contents() -> None:
    p = pools(11)
    assert (p.limit, p.pages, p.bytes) == (11, 0, 0)
    sizes = []
    for need in (1, 2, 3, 5, 9, 11):
        p.hold(need)
        sizes.append(p.pages)
        for layer in p.layers:
            for pool in layer:
                pool[need - 1] = need
    assert sizes == [1, 2, 4, 8, 11, 11]
    for layer in p.layers:
        for pool in layer:
            assert [pool[need - 1].unique().item() for need in (1, 2, 3, 5, 9, 11)] == [1, 2, 3, 5, 9, 11]
    assert p.bytes == sum(pool.numel() * pool.element_size() for layer in p.layers for pool in layer) <= p.memory


def test_pages_cost_what_the_dtype_costs() -> None:
    assert pools(7, torch.bfloat16).page_bytes * 2 == pools(7).page_bytes


def test_what_is_held_is_not_taken_again() -> None:
    p = pools(9)
    p.hold(5)
    before = p.layers[0][0]
    p.hold(3)
    assert p.layers[0][0] is before


def test_a_limit_below_one_page_is_refused_with_both_numbers() -> None:
    with pytest.raises(RequestError, match="one page of 4 tokens needs 1536 bytes; the memory limit is 100"):
        Generator(llama(), page_size=4, memory_limit=100)


def test_free_memory_is_what_the_machine_and_the_control_group_leave(tmp_path: Path) -> None:
    assert 2**20 < free_memory(CPU) < 2**50
    assert _group_memory(tmp_path) == float("inf")
    (tmp_path / "memory.current").write_text("700\n")
    for most, left in (("max", float("inf")), ("1000", 300), ("500", 0)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert _group_memory(tmp_path) == left


def test_without_a_limit_half_of_what_is_free_is_the_limit_and_nothing_is_taken_yet() -> None:
    g = Generator(llama())
    assert g.memory == 0
    limit = g._runner.pools.memory
    assert 0.2 * free_memory(CPU) < limit < 0.9 * free_memory(CPU)


def test_what_is_reserved_is_there_at_once_and_as_much_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    p = pools(800)
    assert p.reserve(3) == p.pages == 100  # an eighth of the limit: growing moves every page
    p.layers[-1][1][99] = 7
    assert p.reserve(150) == 200
    assert p.layers[-1][1][99].unique().item() == 7
    assert p.reserve(9000) == 800
    whole = pools_module._grown

    def scarce(pool: torch.Tensor, count: int) -> torch.Tensor:
        if count > 37:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(pool, count)

    monkeypatch.setattr(pools_module, "_grown", scarce)
    assert pools(800).reserve(30) == 30
    assert 33 <= pools(800).reserve(300) <= 37
