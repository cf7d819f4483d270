"""Ranks that divide a model generate the tokens that one process does, and every rank the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from hasten.errors import RequestError
from hasten.model import Transformer
from hasten.parallel import Group, Place, Processes
from hasten.runtime import Generator, Sampling
from hasten.runtime.graphs import Unrecordable
from hasten.runtime.in_step import InStep, least
from hasten.spec import Tower
from hasten.weights import local, params, shard, sizes
from tests.parallel import ranks, threads
from tests.parallel.towers import grown, towers, weights
from tests.runtime.models import DECODERS
from tests.runtime.test_steps import Again, Never
from tests.tiny import TINY

PROMPTS = [[5, 6, 7], [3], [9, 8, 7, 6, 5, 4, 3, 2, 1], [2, 2]]
GREEDY, DRAWN = Sampling(max_new_tokens=7), Sampling(max_new_tokens=6, temperature=1.2, top_k=20, n=2)
FEW = 9  # pages, of which the prompts and what follows them want more


def shared(t: Tower, group: Group | None) -> Transformer:
    """The tower with random weights, alone or as one rank's share of it, tables of tokens divided too."""
    whole = weights(t)
    if group is None:
        return Transformer(t, whole)
    own = {p.name: shard(p, whole[p.name], group.rank, group.size) for p in params(t)}
    return Transformer(local(t, group.rank, group.size), own, place=Place(group))


def generated(t: Tower, group: Group | None, how: Sampling, **options: Any) -> list[Any]:
    model = shared(t, group)
    page = 4 * model.tower.kv_width * 4  # bytes of 4 tokens
    with Generator(model, page_size=4, memory_limit=FEW * page, **options) as g, torch.inference_mode():
        return [(x.index, x.sample, x.tokens, x.finish_reason) for x in g.generate(PROMPTS, how)]


def on_rank(t: Tower, how: Sampling) -> list[Any]:
    world = dist.group.WORLD
    assert world is not None
    torch.manual_seed(dist.get_rank())  # ranks draw other numbers, if they draw them alone
    return generated(t, Processes(world), how)


def tower(name: str) -> Tower:
    (t,) = towers(name)
    return grown(t)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [n for n in DECODERS if n in TINY])
def test_every_decoder_says_on_several_ranks_what_it_says_on_one(name: str, size: int) -> None:
    t = tower(name)
    assert size in sizes(t)
    want = generated(t, None, GREEDY)
    assert {len(tokens) for _, _, tokens, _ in want} == {GREEDY.max_new_tokens}
    for got in ranks.run(size, on_rank, t, GREEDY):
        assert got == want


def test_rank_0_draws_for_all() -> None:
    first, second = ranks.run(2, on_rank, tower("llama"), DRAWN)
    torch.manual_seed(0)
    assert first == second == generated(tower("llama"), None, DRAWN)


def test_recorded_steps_are_handed_over_in_the_same_numbers() -> None:
    t = tower("gpt2")
    want = generated(t, None, GREEDY)

    def rank(group: threads.Threads) -> tuple[list[Any], int]:
        recorder = Again()
        recorder.steps = lambda seconds: 3 if seconds is None else 1 + group.rank  # as ranks of unequal speed would
        return generated(t, group, GREEDY, recorder=recorder), recorder.done

    (first, done), (second, others) = threads.run(2, rank)
    assert first == second == want
    assert done == others > 0


def test_what_one_rank_cannot_record_none_does() -> None:
    def rank(group: threads.Threads) -> str:
        recorder = InStep(Never() if group.rank else Again(), group, torch.device("cpu"))
        with pytest.raises(Unrecordable) as refusal:
            recorder.record(lambda: None)
        return str(refusal.value)

    assert threads.run(2, rank) == ["another rank cannot record it", "the device has no memory left for it"]


def test_the_rank_with_the_least_memory_decides() -> None:
    assert threads.run(3, lambda g: least(7 - g.rank, g, torch.device("cpu"))) == [5, 5, 5]
    assert least(7, None, torch.device("cpu")) == 7


def test_sums_over_ranks_are_not_batch_invariant() -> None:
    def rank(group: threads.Threads) -> str:
        with pytest.raises(RequestError) as refusal:
            Generator(shared(tower("llama"), group), invariant=True)
        return str(refusal.value)

    assert "2 ranks divide the model" in threads.run(2, rank)[0]
