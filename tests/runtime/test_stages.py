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


def said(name: str, prompts: list[list[int]], **memory: Any) -> list[Any]:
    whole, own = staged(name)
    wrong = []
    with torch.inference_mode():
        alone, staged_ = Generator(whole, page_size=4), Generator(own, page_size=4, **memory)
        for how in SAMPLINGS.values():
            torch.manual_seed(7)
            want = list(map(told, alone.generate(prompts, how)))
            torch.manual_seed(7 + 10 * dist.get_rank())
            got = list(map(told, staged_.generate(prompts, how)))
            wrong += [] if got == want else [(how, got, want)]
    return wrong


def told(g: Generation) -> Any:
    """Logarithms to four digits: other rows beside one move the last of seven."""
    likeliest = g.likeliest and [{t: round(p, 4) for t, p in best.items()} for best in g.likeliest]
    return g.tokens, g.logprobs and [round(p, 4) for p in g.logprobs], likeliest


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_stages_say_what_one_process_says(name: str) -> None:
    assert ranks.run(2, said, name, NINE) == [[], []]
