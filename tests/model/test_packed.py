"""Sequences without their padding: what packing keeps, and that a tower gives real tokens what it gave them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from hasten.inject.attach import attach
from hasten.inject.backbone import Backbone
from hasten.inject.calls import encoder
from hasten.model import Dense
from hasten.model.packed import Packed, packable, packing
from tests.tiny import TINY, build

SEEN = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1], [0, 1, 0, 0, 0]]).bool()


def backbone(name: str) -> Backbone:
    (b,) = attach(build(TINY[name]))
    b.install()
    return b


# ---- packing


def test_rows_of_a_packing_are_the_real_tokens_in_order() -> None:
    p = packing(SEEN)
    assert p.index.tolist() == [0, 1, 2, 7, 8, 9, 15, 17, 19, 21]
    assert p.starts.tolist() == [0, 3, 6, 6, 9, 10, 10]
    assert (p.real, p.starts.dtype) == (10, torch.int32)


@pytest.mark.parametrize(("step", "rows"), [(8, 16), (10, 10), (64, 64)])
def test_rows_are_rounded_up_by_a_sequence_of_copies(step: int, rows: int) -> None:
    p = packing(SEEN, step)
    assert p.index.tolist() == [0, 1, 2, 7, 8, 9, 15, 17, 19, 21] + [0] * (rows - 10)
    assert p.starts.tolist() == [0, 3, 6, 6, 9, 10, rows]
    assert p.real == 10


@pytest.mark.parametrize("step", [1, 16])
def test_unpacking_puts_rows_where_they_were_and_zeros_elsewhere(step: int) -> None:
    x = torch.randn(5, 5, 3)
    p = packing(SEEN, step)
    assert torch.equal(p.unpack(p.pack(x), 5, 5), x * SEEN.unsqueeze(-1))


def test_a_batch_without_a_real_token_is_an_empty_packing() -> None:
    p = packing(torch.zeros(2, 3, dtype=torch.bool))
    assert p.pack(torch.randn(2, 3, 4)).shape == (0, 4)
    assert torch.equal(p.unpack(torch.zeros(0, 4), 2, 3), torch.zeros(2, 3, 4))


# ---- towers


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "clip_text_model"])
@pytest.mark.parametrize("step", [1, 32])
def test_real_tokens_get_what_the_rectangle_gave_them(name: str, step: int) -> None:
    if name not in TINY:
        pytest.skip(f"no tiny {name}")
    b = backbone(name)
    if not packable(b.tower):
        pytest.skip(f"{name} is not packable")
    t, seen = b.transformer, SEEN[[0, 1, 3]]
    x, positions = torch.randn(3, 5, t.tower.width), torch.arange(5).expand(3, 5)
    want = t.blocks(x, Dense(positions, seen=seen))
    p = packing(seen, step)
    got = p.unpack(t.blocks(p.pack(x), Packed(p.pack(positions), p.starts)), 3, 5)
    torch.testing.assert_close(got[seen], want[seen], atol=2e-5, rtol=2e-5)
    assert got[~seen].eq(0).all()


def test_towers_that_look_at_distances_are_not_packable() -> None:
    assert packable(backbone("bert").tower)
    assert not packable(backbone("mpnet").tower)
    bert = backbone("bert").tower
    block = bert.blocks[0]
    windowed = replace(block, attention=replace(block.attention, window=4))
    assert not packable(replace(bert, blocks=(windowed, *bert.blocks[1:])))


# ---- through a model


@pytest.mark.parametrize(("real", "packs"), [(3, True), (10, False)])
def test_padding_is_left_out_where_there_is_enough_of_it(
    real: int, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = build(TINY["bert-pooled"])
    ours = copy.deepcopy(theirs)
    (b,) = attach(ours)
    b.install(skip_padding=True)
    made: list[int] = []
    monkeypatch.setattr(encoder, "packing", lambda *a: made.append(1) or packing(*a))
    ids, mask = torch.randint(3, 40, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    mask[1, real:] = 0
    if not packs:
        mask[1, 9:] = 0  # one token of twenty
    with torch.no_grad():
        x, y = ours(ids, attention_mask=mask), theirs(ids, attention_mask=mask)
    assert bool(made) == packs
    where = mask.bool()
    torch.testing.assert_close(x.last_hidden_state[where], y.last_hidden_state[where], atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(x.pooler_output, y.pooler_output, atol=3e-5, rtol=3e-5)
    assert x.last_hidden_state.isfinite().all()


def test_a_head_sees_what_transformers_gives_padding() -> None:
    theirs = build(TINY["bert"])
    ours = copy.deepcopy(theirs)
    (b,) = attach(ours)
    b.install()
    ids, mask = torch.randint(3, 40, (2, 5)), SEEN[[0, 4]].long()
    with torch.no_grad():
        x, y = (m(ids, attention_mask=mask).logits for m in (ours, theirs))
    torch.testing.assert_close(x, y, atol=3e-5, rtol=3e-5)


def test_a_batch_of_nothing_but_padding_gives_numbers() -> None:
    ours = build(TINY["bert-pooled"])
    (b,) = attach(ours)
    b.install()
    with torch.no_grad():
        y = ours(torch.ones(2, 4, dtype=torch.long), attention_mask=torch.zeros(2, 4, dtype=torch.long))
    assert y.last_hidden_state.shape[:2] == (2, 4)
    assert y.last_hidden_state.isfinite().all()


def test_hidden_states_come_with_their_padding() -> None:
    theirs = build(TINY["bert-pooled"])
    ours = copy.deepcopy(theirs)
    (b,) = attach(ours)
    b.install()
    mask = SEEN[:2].long()
    ids = torch.randint(3, 40, (2, 5))
    with torch.no_grad():
        x, y = (m(ids, attention_mask=mask, output_hidden_states=True) for m in (ours, theirs))
    for p, q in zip(x.hidden_states, y.hidden_states, strict=True):
        torch.testing.assert_close(p[SEEN[:2]], q[SEEN[:2]], atol=3e-5, rtol=3e-5)
