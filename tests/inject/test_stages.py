"""Live models whose layers several processes hold one after the other answer as they do alone, and come back whole."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hasten
from hasten.errors import RequestError
from hasten.inject.attach import attach
from hasten.inject.backbone import Backbone
from hasten.inject.loan import divides, live_tensors
from hasten.inject.probe import probe
from hasten.weights import holders, share
from tests.inject.test_ranks import BATCH, GREEDY, IDS, cast, first, generated, refused, worked_on
from tests.parallel import ranks
from tests.tiny import TINY, build


def called(name: str, given: dict[str, Any]) -> tuple[float, bool, bool]:
    """The largest difference of a call, and whether state_dict and revert are exact.

    Unless several backbones share a table, this stage has no more than its blocks and what is at its end of the model.
    """
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
    if len(engine.backbones) == 1:
        assert weighs(engine) == due(engine.backbones[0])
    before, state = theirs.state_dict(), engine.module.state_dict()
    exact = before.keys() == state.keys() and all(torch.equal(before[k], state[k]) for k in before)
    engine.revert()
    back = model.state_dict()
    reverted = all(torch.equal(before[k], back[k]) for k in before) and "forward" not in vars(attach(model)[0].module)
    return lost, exact, reverted


def weighs(engine: Any) -> int:
    """Numbers of the backbone's parameters that are here, borrowed or not."""
    (b,), tensors = engine.backbones, live_tensors(engine.module)
    here = [*(tensors[k] for one in b.bindings for k in one.keys), *b.transformer.weights.values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in here}.values())


def due(b: Backbone) -> int:
    """Numbers of the parameters that this rank's stage is for, as the description has them."""
    assert b.division is not None
    cuts, place = b.division.cuts(b.tower), b.division.place
    rank = 0 if place.chain is None else place.chain.rank
    stored = {one.keys: one for one in b.bindings if rank in holders(b.tower, one.param, cuts)}
    size = b.division.group.size
    held = [share(one.param, size) if divides(b.division, one) else one.param for one in stored.values()]
    return sum(math.prod(p.shape) for p in held)


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


def test_what_users_do_with_a_model_in_stages() -> None:
    assert ranks.run(2, worked_on, {"pp_size": 2}) == [[], []]
    assert ranks.run(2, cast, {"pp_size": 2}) == [[True, True]] * 2


@torch.no_grad()
def states(name: str) -> list[float]:
    """How far each hidden state is from transformers' own."""
    theirs: Any = build(TINY[name])
    engine: Any = hasten.init_inference(build(TINY[name]), pp_size=2)
    want, got = (m(**BATCH, output_hidden_states=True).hidden_states for m in (theirs, engine))
    assert len(want) == len(got)
    seen = BATCH["attention_mask"].bool()
    return [float((a - b)[seen].abs().max()) for a, b in zip(want, got, strict=True)]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_hidden_states_of_all_stages(name: str) -> None:
    assert all(max(off) < 1e-4 for off in ranks.run(2, states, name))


@torch.no_grad()
def pieces(name: str) -> tuple[int, float]:
    """Pieces in which a batch on its way through, and how far the answer of its cache's next step is from theirs."""
    theirs: Any = build(TINY[name])
    engine: Any = hasten.init_inference(build(TINY[name]), pp_size=2)
    ids = torch.randint(3, 60, (5, 30))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[4, :9] = 0
    b = engine.backbones[0]
    sent, through = list[int](), b.transformer.through
    b.transformer.through = lambda x, ctx, watch=None: sent.append(len(x)) or through(x, ctx, watch)
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
    want, got = theirs(**given), engine(**given)
    after = {"input_ids": ids[:, :2], "attention_mask": torch.cat([mask, mask[:, -2:]], 1)}
    two = [m(**after, past_key_values=o.past_key_values).logits for m, o in ((theirs, want), (engine, got))]
    assert sent == [2, 3, 5]
    off = (got.logits - want.logits)[mask.bool()]
    return len(sent), max(float(off.abs().max()), float((two[0] - two[1]).abs().max()))


@pytest.mark.parametrize("name", ["llama", "bloom", "phi3-longrope"])
def test_a_large_batch_goes_in_pieces_and_its_cache_is_whole(name: str) -> None:
    assert all(off < 1e-4 for _, off in ranks.run(2, pieces, name))


def stale() -> str:
    """What is said of a cache that one stage's part of is here, in a call of the model's own forward."""
    engine: Any = hasten.init_inference(build(TINY["llama"]), pp_size=2)
    with torch.no_grad():
        cache = engine(IDS, use_cache=True).past_key_values
        try:
            engine(IDS, past_key_values=cache, output_attentions=True)
        except RequestError as error:
            return str(error)
    return "accepted"


def test_a_cache_of_one_stage_does_not_go_on_elsewhere() -> None:
    assert all("Begin with a new cache" in said for said in ranks.run(2, stale))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pp_size": 3}, "mp_size=1 and pp_size=3 make 3, but 2 processes were started"),
        ({"pp_size": 2, "mp_size": 2}, "mp_size=2 and pp_size=2 make 4, but 2 processes were started"),
        ({"pp": {"pp_size": 2, "layers": [1, 3]}}, "pipeline_parallel.layers=[1, 3] are 4 blocks, and the model has 3"),
    ],
)
def test_what_is_refused_leaves_the_model(given: dict[str, Any], said: str) -> None:
    assert all(said in message for message in ranks.run(2, refused, given, 2))


def test_more_stages_than_blocks() -> None:
    assert all("pp_size=4: the model has 3 blocks" in said for said in ranks.run(4, refused, {"pp_size": 4}, 4))


def own_groups() -> list[bool]:
    """Stages whose processes are not side by side, by an mpu and by groups, and the blocks that the user wants."""
    pairs: list[Any] = [dist.new_group(members) for members in ([0, 1], [2, 3], [0, 2], [1, 3])]
    me = dist.get_rank()
    stages, over = pairs[me // 2], pairs[2 + me % 2]
    mpu = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: 2,
        get_tensor_model_parallel_group=lambda: over,
        get_pipeline_model_parallel_world_size=lambda: 2,
        get_pipeline_model_parallel_group=lambda: stages,
    )
    want = build(TINY["llama"]).generate(**BATCH, **GREEDY)  # pyright: ignore[reportCallIssue]
    given: list[dict[str, Any]] = [
        {"mpu": mpu},
        {"tp": {"tp_group": over}, "pp": {"pp_group": stages, "layers": [1, 2]}},
    ]
    found = []
    for asked in given:
        engine = hasten.init_inference(build(TINY["llama"]), **asked)
        found.append(torch.equal(engine.generate(**BATCH, **GREEDY), want))
    return [*found, engine.backbones[0].here == (range(1, 3) if me % 2 else range(1))]


def test_the_groups_of_an_mpu_or_of_the_user() -> None:
    assert ranks.run(4, own_groups) == [[True] * 3] * 4
