"""Generation through stages says what one process says, in whatever order passes are under way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from hasten.model import Transformer
from hasten.parallel import Place, Processes
from hasten.runtime import Generation, Generator, Sampling
from hasten.weights import cut, part, renamed
from tests.parallel import ranks
from tests.runtime.models import transformer
from tests.runtime.test_ranks import Repeats
from tests.tiny import TINY, build

PROMPTS = [[5, 6, 7], [9, 8, 40, 4, 33, 21, 20, 19, 18, 17, 16], [30], [31, 32, 33, 34, 35, 36, 37]]
NINE = [*PROMPTS, *(p[::-1] for p in PROMPTS), [3, 4]]
SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=12),
    "drawn": Sampling(max_new_tokens=12, temperature=0.8, n=2),
    "scored": Sampling(max_new_tokens=6, logprobs=3, repetition_penalty=1.3),
}


def staged(name: str) -> tuple[Transformer, Transformer]:
    """A decoder alone, and this rank's stage of it."""
    whole, world = transformer(build(TINY[name])), dist.group.WORLD
    assert world is not None
    chain = Processes(world)
    blocks = cut(whole.tower, chain.size)[chain.rank]
    return whole, Transformer(part(whole.tower, blocks), renamed(whole.weights, blocks), place=Place(stages=chain))


def said(name: str, prompts: list[list[int]], recorded: bool, pages: int | None = None) -> list[Any]:
    """What one process and stages say otherwise; pages: as many, in a rank that has few."""
    whole, own = staged(name)
    memory: dict[str, Any] = {"recorder": Repeats() if recorded else None}
    if pages is not None:
        memory["memory_limit"] = 4 * own.tower.kv_width * 4 * (pages if dist.get_rank() else 4 * pages)
    wrong = []
    with torch.inference_mode():
        alone, staged_ = Generator(whole, page_size=4), Generator(own, page_size=4, **memory)
        for how in SAMPLINGS.values():
            torch.manual_seed(7)
            want = alone.generate(prompts, how)
            torch.manual_seed(7 + 10 * dist.get_rank())
            got = staged_.generate(prompts, how)
            wrong += [(how, g, w) for g, w in zip(got, want, strict=True) if not same(g, w)]
    return [*wrong, *([] if pages in (None, staged_._runner.pages.limit) else ["pages"])]


def same(a: Generation, b: Generation) -> bool:
    """The same tokens, and logarithms but for what other rows beside one do to their last digits."""
    if a.tokens != b.tokens or (a.likeliest is None) != (b.likeliest is None):
        return False
    best = zip(a.likeliest or (), b.likeliest or (), strict=True)
    off = [abs(p[t] - q.get(t, torch.inf)) for p, q in best for t in p]
    off += [abs(p - q) for p, q in zip(a.logprobs or (), b.logprobs or (), strict=True)]
    return max(off, default=0) < 1e-4


@pytest.mark.parametrize("recorded", [False, True], ids=["launch by launch", "recorded"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_stages_say_what_one_process_says(name: str, recorded: bool) -> None:
    assert ranks.run(2, said, name, NINE, recorded) == [[], []]


@pytest.mark.parametrize("recorded", [False, True], ids=["launch by launch", "recorded"])
def test_nine_requests_that_give_way_for_each_other(recorded: bool) -> None:
    assert ranks.run(2, said, "llama", NINE, recorded, 9) == [[], []]  # the longest needs six


def order(requests: int, prompt: int, budget: int | None) -> list[tuple[str, int]]:
    """What this rank does in which order: ("begun", rows of the pass) and ("heard", passes still under way)."""
    _, own = staged("llama")
    g = Generator(own, page_size=4, budget=budget)
    events, under = list[tuple[str, int]](), list[Any]()
    runner: Any = g._runner
    start = runner.start

    def begun(rows: Any, *more: Any) -> Any:
        events.append(("begun", len(rows)))
        work = start(rows, *more)
        under.append(work)
        scores = work.scores

        def heard() -> Any:
            if work in under:
                under.remove(work)
                events.append(("heard", len(under)))
            return scores()

        work.scores = heard
        return work

    runner.start = begun
    g.generate([[5 + i] * prompt for i in range(requests)], Sampling(max_new_tokens=4))
    return events


def test_every_stage_begins_a_pass_before_it_hears_of_the_one_in_front() -> None:
    for events in ranks.run(2, order, 9, 3, None):
        assert events[:2] == [("begun", 5), ("begun", 4)]
        kinds = [what for what, _ in events]
        assert kinds == ["begun", *["begun", "heard"] * (len(kinds) // 2 - 1), "heard"]  # always two under way
        assert sum(n for what, n in events if what == "begun") == 9 * 4


def test_pieces_of_one_prompt_follow_each_other_and_its_tokens_wait() -> None:
    for events in ranks.run(2, order, 1, 20, 5):
        kinds = [what for what, _ in events]
        assert kinds == ["begun", "begun", *["heard", "begun"] * 2, "heard", "heard", *["begun", "heard"] * 3]
