"""Rows of the vocabulary on every rank, behind the modules of a live model that read them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hasten
from hasten.errors import RequestError
from tests.parallel import ranks
from tests.tiny import TINY, build

IDS = torch.tensor([[0, 66, 33, 34, 5], [9, 8, 40, 4, 33]])


@torch.no_grad()
def used(name: str) -> list[str]:
    """What a live model with divided tables gives otherwise than one without."""
    theirs, model = build(TINY[name]), build(TINY[name])
    engine = hasten.init_inference(model, mp_size=dist.get_world_size())
    given = IDS.to(model.device)
    theirs.to(model.device)
    wrong: list[str] = []

    def same(what: str, got: Any, want: Any) -> None:
        if got.shape != want.shape or not torch.allclose(got, want, atol=2e-5 * float(want.abs().max())):
            wrong.append(what)

    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    vocab = theirs.get_output_embeddings().weight.shape[0]
    rows = -(-vocab // dist.get_world_size())
    for m in (
        (head, table) if theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight else (head,)
    ):
        if m.weight.shape[0] != rows or m.weight.data_ptr() not in _held(engine):
            wrong.append(f"{type(m).__name__} has {m.weight.shape[0]} rows")
    if sum(t.numel() for t in engine.backbones[0].transformer.weights.values() if len(t) == rows) == 0:
        wrong.append("no table is divided")

    same("logits", engine(input_ids=given).logits, theirs(input_ids=given).logits)
    same("a detour", engine(input_ids=given, output_attentions=True).logits, theirs(input_ids=given).logits)
    same("vectors", table(given), theirs.get_input_embeddings()(given))
    vectors = theirs.get_input_embeddings()(given)
    same("logits of vectors", model(inputs_embeds=table(given)).logits, theirs(inputs_embeds=vectors).logits)
    same("the head", head(vectors[..., : head.in_features]), theirs.get_output_embeddings()(vectors))
    same("a loss", model(input_ids=given, labels=given).loss, theirs(input_ids=given, labels=given).loss)
    for ids in ([[67]], [[-1]]) if given.device.type == "cpu" else ():
        try:
            table(torch.tensor(ids))
            wrong.append(f"{ids} was looked up")
        except IndexError:
            pass
    try:
        model.resize_token_embeddings(99)
        wrong.append("resized")
    except RequestError:
        pass

    other = {k: v * 1.5 if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(other)
    model.load_state_dict(other)
    same("new values", engine(input_ids=given).logits, theirs(input_ids=given).logits)
    state = model.state_dict()  # what ranks share is where the model was
    if any(not torch.equal(v.cpu(), state[k].cpu()) for k, v in other.items()):
        wrong.append("state")
    twin = copy.deepcopy(model)
    model.load_state_dict({k: v * 0 for k, v in other.items()})
    same("a copy", twin(input_ids=given).logits, theirs(input_ids=given).logits)
    model.load_state_dict(other)
    model.double()
    same("another dtype", engine(input_ids=given).logits, theirs.double()(input_ids=given).logits)
    if model.get_output_embeddings().weight.data_ptr() not in _held(engine):
        wrong.append("two copies after a move")
    engine.revert()
    theirs.to(model.device)
    given = IDS.to(model.device)
    same("reverted", model(input_ids=given).logits, theirs(input_ids=given).logits)
    if model.get_input_embeddings().weight.shape[0] != vocab or "forward" in vars(head) or "forward" in vars(table):
        wrong.append("not reverted")
    model.resize_token_embeddings(99)
    return wrong


def _held(engine: hasten.InferenceEngine) -> set[int]:
    return {t.data_ptr() for t in engine.backbones[0].transformer.weights.values()}


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma3_text",  # tied, behind a table that scales
        "phi",  # a head with a bias
        "opt-350m",  # narrower than the model
    ],
)
def test_divided_tables_read_as_whole_ones(name: str) -> None:
    assert ranks.run(2, used, name) == [[], []]
