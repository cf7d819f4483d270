"""A tower divided among ranks computes what it computes alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from hasten.spec import Mlp, Tower
from hasten.weights import Split, sizes
from tests.parallel import ranks, threads
from tests.parallel.towers import computed, grown, on_rank, towers
from tests.tiny import TINY

every = pytest.mark.parametrize("name", TINY)
SPLITS: tuple[Split, ...] = "inside", "whole"


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def splits(t: Tower) -> tuple[Split, ...]:
    return SPLITS[: 1 if all(isinstance(b.mlp, Mlp) for b in t.blocks) else 2]


@every
def test_threads_that_share_a_tower_compute_what_one_does(name: str) -> None:
    for t in towers(name):
        for tower in (t, grown(t)):
            want = computed(tower)
            assert want.isfinite().all() and want.std() > 0.05
            for experts in splits(tower):
                for size in {2, 3, 4} & set(sizes(tower, experts)):
                    for split_vocab in (False, True):
                        work = partial(computed, tower, experts=experts, split_vocab=split_vocab)
                        for got in threads.run(size, work):
                            same(got, want)


@every
@pytest.mark.parametrize("size", [2, 4])
def test_processes_that_share_a_tower_compute_what_one_does(name: str, size: int) -> None:
    for t in map(grown, towers(name)):
        want = computed(t)
        for experts in splits(t):
            for got in ranks.run(size, on_rank, t, experts, True):
                same(got, want)
