"""Live models whose layers several processes hold one after the other answer as they do alone, and come back whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hasten
from hasten.inject.attach import attach
from hasten.inject.probe import probe
from tests.inject.test_ranks import first, generated
from tests.parallel import ranks
from tests.tiny import TINY, build


def called(name: str, given: dict[str, Any]) -> tuple[float, bool, bool]:
    """The largest difference of a call, and whether state_dict and revert are exact."""
    theirs, model = build(TINY[name]), build(TINY[name])
    asked = {**TINY[name].own(), **probe(theirs, attach(theirs))}
    engine = hasten.init_inference(model, **given)
    with torch.no_grad():
        want = first(theirs(**asked))
        off = (first(engine(**asked)) - want).abs()
    seen = asked.get("attention_mask")
    if seen is not None and seen.shape == off.shape[:2]:
        off = off[seen.bool()]  # what stands at padding means nothing
    lost = float(off.max() / want.abs().max())
    assert all(b.calls > 0 and not b.detours for b in engine.backbones), engine.explain()
    before, state = theirs.state_dict(), engine.module.state_dict()
    exact = before.keys() == state.keys() and all(torch.equal(before[k], state[k]) for k in before)
    engine.revert()
    back = model.state_dict()
    reverted = all(torch.equal(before[k], back[k]) for k in before) and "forward" not in vars(attach(model)[0].module)
    return lost, exact, reverted


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "mixtral", "bert", "t5", "vit", "albert", "opt", "whisper"]
)
def test_a_call_and_the_state_of_a_model_in_two_stages(name: str) -> None:
    for lost, exact, reverted in ranks.run(2, called, name, {"pp_size": 2}):
        assert lost < 3e-5
        assert exact
        assert reverted


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_in_two_stages(name: str) -> None:
    assert ranks.run(2, generated, name, {"pp_size": 2}) == [[], []]


def test_layers_divided_by_two_in_two_stages() -> None:
    given = {"mp_size": 2, "pp_size": 2}
    for lost, exact, reverted in ranks.run(4, called, "llama", given):
        assert lost < 3e-5
        assert exact
        assert reverted
    assert ranks.run(4, generated, "llama", given) == [[]] * 4
