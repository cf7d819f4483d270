"""What a group of processes and a group of threads promise, both alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hasten.errors import RequestError
from hasten.parallel import ALONE, Group, Place, Processes
from tests.parallel import ranks, threads

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.int64


def own(rank: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(30).view(2, 3, 5) * (rank + 1) % 7).to(dtype)


def exchanged(g: Group) -> Any:
    """What a rank hears: whether sums come in place, sums, gathered tensors with and without gaps, and a value."""
    sums = []
    for dtype in DTYPES:
        t = own(g.rank, dtype)
        assert g.all_reduce(t).data_ptr() == t.data_ptr()
        sums.append(t)
    gathered = [g.all_gather(own(g.rank, torch.float32)), g.all_gather(own(g.rank, torch.float32).mT)]
    return g.rank, g.size, sums, gathered, g.share({"rank": g.rank})


def on_rank() -> Any:
    world = dist.group.WORLD
    assert world is not None
    return exchanged(Processes(world))


def in_half() -> tuple[int, list[int], float]:
    """The rank in a group of two of four, what its rank 0 shares, and a sum."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    g = Processes(groups[dist.get_rank() % 2])
    return g.rank, g.share([dist.get_rank()]), g.all_reduce(torch.tensor([float(dist.get_rank())])).item()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_every_rank_hears_all(size: int, kind: str) -> None:
    heard = ranks.run(size, on_rank) if kind == "processes" else threads.run(size, exchanged)
    for rank, (r, n, sums, gathered, value) in enumerate(heard):
        assert (r, n, value) == (rank, size, {"rank": 0})
        for got, dtype in zip(sums, DTYPES, strict=True):
            assert got.dtype == dtype
            assert torch.equal(got, torch.stack([own(k, dtype) for k in range(size)]).sum(0))
        assert torch.equal(gathered[0], torch.cat([own(k, torch.float32) for k in range(size)], -1))
        assert torch.equal(gathered[1], torch.cat([own(k, torch.float32).mT for k in range(size)], -1))


def test_ranks_of_a_smaller_group_count_from_zero() -> None:
    assert ranks.run(4, in_half) == [(0, [0], 2.0), (0, [1], 4.0), (1, [0], 2.0), (1, [1], 4.0)]


def differentiated() -> list[tuple[bool, str]]:
    world, made = dist.group.WORLD, []
    assert world is not None
    g = Processes(world)
    for exchange in (g.all_reduce, g.all_gather):
        w = torch.ones(2, 2, requires_grad=True)
        y = exchange(w @ torch.ones(2, 2)) * 2
        try:
            y.sum().backward()
        except RequestError as e:
            made.append((bool((y == 4 if exchange == g.all_gather else y == 8).all()), str(e)))
    return made


def test_an_exchange_that_somebody_wants_a_gradient_of_gives_numbers_and_refuses_the_gradient() -> None:
    for made in ranks.run(2, differentiated):
        assert [right for right, _ in made] == [True, True]
        assert all("gives no gradients" in message for _, message in made)


def test_an_error_in_one_thread_is_raised_and_ends_the_others() -> None:
    def fail(g: threads.Threads) -> None:
        if g.rank == 1:
            raise ValueError("on purpose")
        g.share(1)

    with pytest.raises(ValueError, match="on purpose"):
        threads.run(3, fail)


def test_a_place_has_an_even_part_of_an_axis_and_exchanges_only_with_others() -> None:
    x = torch.arange(24).view(2, 6, 2)
    assert ALONE.own(x, 1) is x
    assert ALONE.over is None
    assert threads.run(1, lambda g: Place(g).over) == [None]
    places = threads.run(3, lambda g: (Place(g).own(x, 1), Place(g).over is g))
    for rank, (part, exchanges) in enumerate(places):
        assert exchanges
        assert torch.equal(part, x[:, 2 * rank : 2 * rank + 2])
