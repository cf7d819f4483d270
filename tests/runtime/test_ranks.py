"""Ranks that share a model stay in step, whatever differs between them: memory, time, draws and recordings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hasten.model import Transformer
from hasten.parallel import Place, Processes
from hasten.runtime import Generator, Sampling
from hasten.runtime.graphs import Unrecordable
from hasten.weights import local, params, shard
from tests.parallel import ranks
from tests.runtime.models import transformer
from tests.tiny import TINY, build

PROMPTS = [[5, 6, 7], [9, 8, 40, 4, 33, 21, 20, 19, 18, 17, 16], [30], [31, 32, 33, 34, 35, 36, 37]]
GREEDY, DRAWN = Sampling(max_new_tokens=12), Sampling(max_new_tokens=12, temperature=0.8, n=2)


def divided(name: str) -> tuple[Transformer, Transformer]:
    """A decoder alone, and this rank's share of it."""
    whole, world = transformer(build(TINY[name])), dist.group.WORLD
    assert world is not None
    g = Processes(world)
    split = {p.name: p for p in params(whole.tower) if p.role != "vocab"}
    own = {n: shard(split[n], w, g.rank, g.size) if n in split else w for n, w in whole.weights.items()}
    return whole, Transformer(local(whole.tower, g.rank, g.size), own, place=Place(g))


class Repeats:
    """Records by doing the work again. Each rank finds that steps take another time, and the last refuses some."""

    def __init__(self) -> None:
        self.asked = 0

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        self.asked += 1
        if dist.get_rank() == 1 and self.asked % 2 == 0:
            raise Unrecordable("this rank has no room")
        return work

    def steps(self, seconds: float | None) -> int:
        return 4 if seconds is None else 1 + 3 * dist.get_rank()


def said(name: str, recorded: bool) -> list[Any]:
    """The tokens of one process, and whether this rank said the same with few pages, fewer on another rank."""
    whole, own = divided(name)
    page = 4 * own.tower.kv_width * 4
    limit = page * (9 if dist.get_rank() else 40)  # the longest needs six
    with torch.inference_mode():
        alone = Generator(whole, page_size=4)
        crowd = Generator(own, page_size=4, memory_limit=limit, recorder=Repeats() if recorded else None)
        wrong = []
        for how in (GREEDY, DRAWN):
            torch.manual_seed(7)
            want = [g.tokens for g in alone.generate(PROMPTS, how)]
            torch.manual_seed(7 + 10 * dist.get_rank())
            got = [g.tokens for g in crowd.generate(PROMPTS, how)]
            wrong += [] if got == want else [(how, got, want)]
        return [*wrong, *([] if crowd._runner.pages.limit <= 9 else ["pages"])]


@pytest.mark.parametrize("recorded", [False, True], ids=["launch by launch", "recorded"])
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_ranks_of_unequal_memory_speed_and_seed_say_the_same(name: str, recorded: bool) -> None:
    assert ranks.run(2, said, name, recorded) == [[], []]
