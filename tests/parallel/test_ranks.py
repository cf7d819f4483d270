"""The processes that other tests run on: they answer in order, and their errors, silence and deaths come back."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel import ranks


def total(x: int) -> tuple[int, float]:
    t = torch.tensor(float(x + dist.get_rank()))
    dist.all_reduce(t)
    return dist.get_rank(), t.item()


def seeded() -> tuple[torch.Tensor, str]:
    return torch.randn(3), os.environ["RANK"]


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"on purpose, {rank}")
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_answers_in_order(size: int) -> None:
    assert ranks.run(size, total, 1) == [(r, size + size * (size - 1) / 2) for r in range(size)]


def test_ranks_are_seeded_alike_and_know_who_they_are() -> None:
    (a, zero), (b, one) = ranks.run(2, seeded)
    assert torch.equal(a, b)
    assert (zero, one) == ("0", "1")
    assert torch.equal(ranks.run(2, seeded)[0][0], a)


def test_an_error_silence_and_death_come_back_and_the_next_call_finds_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE", 0.5)
    with pytest.raises(ranks.RankError, match=r"(?s)rank 0 of 2: no answer.*in barrier.*rank 1 of 2: .*on purpose, 1"):
        ranks.run(2, fail_on, 1)
    ranks.run(2, total, 0)
    with pytest.raises(ranks.RankError, match=r"(?s)^rank 0 of 2: no answer after 0 s.*in sleep_on"):
        ranks.run(2, sleep_on, 0, timeout=0.3)
    ranks.run(2, total, 0)
    with pytest.raises(ranks.RankError, match="^rank 1 of 2: ended with exit code 3$"):
        ranks.run(2, die_on, 1)
    assert ranks.run(2, total, 0) == [(0, 1.0), (1, 1.0)]
