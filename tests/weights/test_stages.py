"""Where a tower is cut into stages, against every way of cutting it, and what each stage holds."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigError
from hasten.inject.attach import attach
from hasten.spec import Mlp, Tokens, Tower
from hasten.weights import counted, cut, holders, params, part, renamed
from hasten.weights.stages import costs, head_cost
from tests.tiny import TINY, build


def tower(name: str) -> Tower:
    return attach(build(TINY[name]))[0].tower


LLAMA = tower("llama")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(0, 60), st.integers(1, 5))
def test_the_dearest_stage_is_as_cheap_as_any_way_of_cutting_makes_it(each: list[int], behind: int, n: int) -> None:
    t = replace(LLAMA, blocks=LLAMA.blocks[:1] * len(each))
    if n > len(each):
        pytest.raises(ConfigError, cut, t, n, each, behind).match(f"pp_size={n}: the model has {len(each)} blocks")
        return
    price = [*each[:-1], each[-1] + behind]

    def dearest(cuts: list[range] | tuple[range, ...]) -> int:
        return max(sum(price[i] for i in blocks) for blocks in cuts)

    ways = ([0, *inner, len(each)] for inner in combinations(range(1, len(each)), n - 1))
    best = min(dearest([range(a, b) for a, b in pairwise(ends)]) for ends in ways)
    found = cut(t, n, each, behind)
    assert dearest(found) == best
    assert [i for blocks in found for i in blocks] == list(range(len(each)))
    assert len(found) == n and all(found)


def test_a_block_costs_what_a_token_reads_of_it() -> None:
    moe = tower("mixtral")
    m = moe.blocks[0].mlp
    assert not isinstance(m, Mlp)
    sizes = {p.name: torch.Size(p.shape).numel() for p in params(moe) if p.block == 0}
    experts = sum(n for name, n in sizes.items() if name in ("blocks.0.up.weight", "blocks.0.down.weight"))
    assert costs(moe)[0] == sum(sizes.values()) - experts + experts * m.top_k // m.experts
    assert m.top_k < m.experts


def test_a_head_moves_the_cut() -> None:
    assert isinstance(LLAMA.embed, Tokens)
    t = replace(LLAMA, blocks=LLAMA.blocks[:1] * 12)
    large = replace(t, embed=replace(LLAMA.embed, vocab=6 * costs(t)[0] // LLAMA.width))
    assert head_cost(large) // costs(t)[0] == 6
    assert cut(large, 2) == (range(9), range(9, 12))
    assert cut(replace(large, head=None), 2) == (range(6), range(6, 12))
    assert cut(large, 1) == (range(12),)


def test_the_users_cut_has_to_be_all_blocks() -> None:
    assert counted(LLAMA, [1, 2]) == (range(1), range(1, 3))
    with pytest.raises(ConfigError, match=r"layers=\[2, 2\] are 4 blocks, and the model has 3"):
        counted(LLAMA, [2, 2])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m", "t5", "bert", "whisper", "qwen2_moe-alternate"])
def test_stages_have_every_parameter_of_their_towers_and_hold_nothing_twice_but_small_ones(name: str) -> None:
    for b in attach(build(TINY[name])):
        cuts = cut(b.tower, 2)
        whole = {p.name: torch.empty(p.shape, device="meta") for p in params(b.tower)}
        seen: dict[str, int] = {}
        for stage, blocks in enumerate(cuts):
            held = {p.name for p in params(b.tower) if stage in holders(b.tower, p, cuts)}
            own = renamed({n: w for n, w in whole.items() if n in held}, blocks)
            named = {p.name: p.shape for p in params(part(b.tower, blocks))}
            assert own.keys() <= named.keys()
            assert all(own[n].shape == named[n] for n in own)
            lacking = {n for n in named.keys() - own.keys() if n.startswith("blocks")}
            assert not lacking
            seen |= {n: seen.get(n, 0) + 1 for n in held}
        assert seen.keys() == whole.keys()
        twice = {n.split(".")[0] for n, count in seen.items() if count > 1}
        assert twice <= {"final_norm", "buckets", "project_out", "tokens"}
        assert ("tokens" in twice) == (b.tower.head is not None and b.tower.head.tied)
