"""A rank that reads only its slices of stored tensors fetches the share that `shard` cuts out of the whole."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from hasten.inject.attach import attach
from hasten.inject.loan import live_tensors
from hasten.weights import Binding, Split, fetch, is_split, portion, shard, share, sizes
from tests.tiny import TINY, build

IN_WHOLE = {"codegen": {"qkv"}}
"""Slots of which a rank reads whole tensors: what it needs of one does not lie together."""


def needed(b: Binding, rank: int, size: int, experts: Split) -> tuple[torch.Tensor, int, int] | None:
    """A share made of slices of numbered tensors, the elements that were read, and those that there are."""
    own = portion(b, rank, size, experts)
    if own is None:
        return None
    read = {k: own.slices[k].of(TENSORS[k].__getitem__) for k in own.binding.keys}
    return fetch(own.binding, read), sum(t.numel() for t in read.values()), sum(TENSORS[k].numel() for k in b.keys)


TENSORS: dict[str, torch.Tensor] = {}


@pytest.mark.parametrize("name", TINY)
def test_slices_give_the_share(name: str) -> None:
    model = build(TINY[name])
    TENSORS.clear()
    TENSORS.update({k: t.detach() for k, t in live_tensors(model).items()})
    whole = Counter[str]()
    for b in attach(model):
        for experts in ("inside", "whole"):
            for size in [n for n in sizes(b.tower, experts) if n > 1]:
                for one in (one for one in b.bindings if is_split(one.param, experts)):
                    for rank in {0, size - 1}:
                        _check(one, rank, size, experts, whole)
    assert set(whole) == IN_WHOLE.get(name, set())


def _check(one: Binding, rank: int, size: int, experts: Split, whole: Counter[str]) -> None:
    found = needed(one, rank, size, experts)
    if found is None:
        whole[one.param.slot] += 1
        return
    got, read, there = found
    want = shard(one.param, fetch(one, TENSORS), rank, size, experts)
    assert torch.equal(got, want[: len(got)])
    assert not want[len(got) :].any()  # rows by which the last share of a vocabulary is padded
    assert read < there or there == 0
    assert share(one.param, size, experts).shape == want.shape
