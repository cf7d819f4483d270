"""Live models that several processes hold together answer as they do alone, and come back whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hasten
from hasten.errors import ConfigError, HastenError
from hasten.inject.attach import attach
from hasten.inject.probe import probe
from hasten.weights import sizes
from tests.parallel import ranks
from tests.tiny import TINY, build

DECODERS = [name for name, tiny in TINY.items() if tiny.kind == "decoder"]
IDS = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 40, 4, 33]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
GREEDY = {"max_new_tokens": 7, "min_new_tokens": 7, "pad_token_id": 0, "do_sample": False}
PROMPTS = [[5, 6, 7], [9, 8, 40, 4, 33, 21, 20, 19, 18, 17, 16], [30]]


def fits(name: str, size: int) -> bool:
    return all(size in sizes(b.tower) for b in attach(build(TINY[name])))


def first(output: Any) -> Tensor:
    values = output.values() if hasattr(output, "values") else [output] if isinstance(output, Tensor) else output
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def called(name: str, size: int) -> tuple[float, bool, bool, int, int]:
    """The largest difference of a call, whether state_dict and revert are exact, and weights here and in all."""
    theirs, model = build(TINY[name]), build(TINY[name])
    given = {**probe(theirs, attach(theirs)), **TINY[name].own()}
    engine = hasten.init_inference(model, mp_size=size)
    with torch.no_grad():
        want = first(theirs(**given))
        off = (first(engine(**given)) - want).abs()
    seen = given.get("attention_mask")
    if seen is not None and seen.shape == off.shape[:2]:
        off = off[seen.bool()]  # what stands at padding means nothing
    lost = float(off.max() / want.abs().max())
    assert all(b.calls > 0 and not b.detours for b in engine.backbones), engine.explain()
    before, state = theirs.state_dict(), engine.module.state_dict()
    exact = before.keys() == state.keys() and all(torch.equal(before[k], state[k]) for k in before)
    here = sum(w.numel() for b in engine.backbones for w in b.transformer.weights.values())
    whole = sum(p.numel() for p in engine.revert().parameters())
    back = model.state_dict()
    reverted = all(torch.equal(before[k], back[k]) for k in before) and "forward" not in vars(attach(model)[0].module)
    return lost, exact, reverted, here, whole


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", TINY)
def test_a_call_and_the_state_of_a_divided_model(name: str, size: int) -> None:
    if not fits(name, size):
        with pytest.raises(ranks.RankError, match=f"cannot be divided among {size} ranks"):
            ranks.run(size, called, name, size)
        return
    for lost, exact, reverted, here, whole in ranks.run(size, called, name, size):
        assert lost < 3e-5
        assert exact
        assert reverted
        assert here < whole


def generated(name: str, given: dict[str, Any]) -> list[Any]:
    """What differs between one process and several in generation."""
    theirs: Any
    theirs, alone, engine = build(TINY[name]), build(TINY[name]), build(TINY[name])
    alone, engine = hasten.init_inference(alone), hasten.init_inference(engine, **given)
    wrong: list[Any] = []

    def same(what: str, make: Callable[[Any], Any]) -> None:
        torch.manual_seed(3)
        want = make(alone)
        torch.manual_seed(3 if dist.get_rank() == 0 else 50)
        got = make(engine)
        if not (torch.equal(got, want) if isinstance(want, Tensor) else got == want):
            wrong.append((what, got, want))

    same("greedy", lambda e: e.generate(**BATCH, **GREEDY))
    if not torch.equal(engine.generate(**BATCH, **GREEDY), theirs.generate(**BATCH, **GREEDY)):
        wrong.append("greedy as transformers")
    same("sampled", lambda e: e.generate(**BATCH, **(GREEDY | {"do_sample": True, "top_k": 9})))
    same("beams", lambda e: e.generate(**BATCH, **GREEDY, num_beams=3))
    if engine.generating is not None:
        same("unequal", lambda e: [g.tokens for g in e.generate(PROMPTS, max_new_tokens=9)])
        draws = {"max_new_tokens": 6, "temperature": 0.9, "n": 3}
        same("samples", lambda e: [g.tokens for g in e.generate(PROMPTS, **draws)])
        same("stream", lambda e: [(v.index, v.token) for v in e.generate(PROMPTS, max_new_tokens=5, stream=True)])
    return wrong


@pytest.mark.parametrize("name", [*DECODERS, "t5", "bart"])
def test_generation_in_step(name: str) -> None:
    size = next((n for n in (4, 2, 3) if fits(name, n)), None)
    if size is None:
        pytest.skip("it has no equal parts")
    assert ranks.run(size, generated, name, {"mp_size": size}) == [[]] * size


def own_group() -> list[bool]:
    """In two groups of two: an mpu, and a group by itself."""
    pairs: list[Any] = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[dist.get_rank() // 2]
    mpu = SimpleNamespace(
        get_model_parallel_world_size=lambda: 2,
        get_model_parallel_rank=lambda: dist.get_rank(group),
        get_model_parallel_group=lambda: group,
    )
    theirs: Any = build(TINY["llama"])
    want = theirs.generate(**BATCH, **GREEDY)
    found = []
    ways: list[dict[str, Any]] = [
        {"mpu": mpu},
        {"mp_size": 2, "mpu": mpu},
        {"tp": {"tp_group": group}},
        {"tp": {"mpu": mpu}},
    ]
    for given in ways:
        engine = hasten.init_inference(build(TINY["llama"]), **given)
        found.append(torch.equal(engine.generate(**BATCH, **GREEDY), want))
        explanation = str(engine.explain())
        assert f"on rank {dist.get_rank(group)} of 2" in explanation
        assert "settle_over " in explanation and "project " not in explanation
    return found


def test_the_group_of_an_mpu_or_of_the_user() -> None:
    assert ranks.run(4, own_group) == [[True] * 4] * 4


def worked_on(given: dict[str, Any]) -> list[str]:
    """Detours, load_state_dict, deep copies, to(), casts and the certificate."""
    theirs: Any
    theirs, model = build(TINY["bloom"]), build(TINY["bloom"])
    engine = hasten.init_inference(model, **given, certify=True)
    wrong = [] if engine.certificate is not None and engine.certificate.passed else [str(engine.certificate)]
    with torch.no_grad():

        def same(what: str, a: nn.Module, b: Any, bound: float = 1e-5) -> None:
            want, got = first(a(IDS[1:])).float(), first(b(IDS[1:])).float()
            if not torch.allclose(got, want, atol=bound, rtol=bound):
                wrong.append(what)

        attentions = theirs.set_attn_implementation("eager") or engine(**BATCH, output_attentions=True).attentions
        if attentions and attentions[0] is not None and attentions[0].shape[1] != 12:
            wrong.append("detour")
        if engine.backbones[0].detours.total() != 1 + 1:  # the certificate's own, and this
            wrong.append(f"detours {engine.backbones[0].detours}")
        same("after a detour", theirs, engine)
        other = {k: v + 0.1 if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
        twin = copy.deepcopy(model)
        same("a copy", theirs, twin)
        model.load_state_dict(other)
        same("a copy stays", theirs, twin)
        theirs.load_state_dict(other)
        same("loaded", theirs, engine, 1e-4)
        engine.module.to(torch.float64)
        same("moved", theirs.to(torch.float64), engine)
    return wrong


def test_what_users_do_with_a_divided_model() -> None:
    assert ranks.run(2, worked_on, {"mp_size": 2}) == [[]] * 2


def cast(given: dict[str, Any]) -> list[bool]:
    theirs, model = build(TINY["llama"]), build(TINY["llama"])
    engine = hasten.init_inference(model, **given, dtype=torch.bfloat16, keep_originals=True)
    dtypes = {w.dtype for w in engine.backbones[0].transformer.weights.values()}
    engine.revert()
    state = model.state_dict()
    return [dtypes == {torch.bfloat16}, all(torch.equal(v, state[k]) for k, v in theirs.state_dict().items())]


def test_a_cast_that_keeps_originals_comes_back_exact() -> None:
    assert ranks.run(2, cast, {"mp_size": 2}) == [[True, True]] * 2


def refused(given: dict[str, Any], size: int, unlike: str = "") -> str:
    model = build(TINY["llama"])
    if dist.get_rank() == 1:
        with torch.no_grad():
            if unlike == "values":
                next(model.parameters()).add_(1)
            elif unlike == "not finite":
                next(model.parameters()).fill_(torch.nan)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        hasten.init_inference(model, **given)
    except HastenError as error:
        after = model.state_dict()
        assert all(torch.equal(v, after[k]) or not v.isfinite().all() for k, v in before.items())
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("given", "unlike", "said"),
    [
        ({"mp_size": 3}, "", ["mp_size=3, but 2 processes", "hasten run --num_gpus 3"]),
        ({"mp_size": 2}, "values", ["rank 1 of 2 loaded another model than rank 0: the parameters' values differ"]),
        ({"mp_size": 2}, "not finite", ["gave it up too. rank 1: WeightError", "finite"]),
        ({"mp_size": 2, "batch_invariant": True}, "", ["batch_invariant=True", "2 processes"]),
        ({"pp_size": 2, "replace_with_kernel_inject": False}, "", ["replace_with_kernel_inject=False", "2 processes"]),
        ({"mp_size": 2, "ep_size": 3}, "", ["ep_size=3", "which is 2"]),
    ],
)
def test_what_is_refused_leaves_the_model(given: dict[str, Any], unlike: str, said: list[str]) -> None:
    messages = ranks.run(2, refused, given, 2, unlike)
    assert "accepted" not in messages
    if unlike == "not finite":
        assert said[0] in messages[0]
        assert said[1] in messages[1]
    else:
        assert all(part in m for m in messages for part in said)


def test_one_process_alone_says_how_to_start_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="this one is alone .*hasten run --num_gpus 2 script.py"):
        hasten.init_inference(build(TINY["llama"]), mp_size=2)


def test_a_group_that_exchanges_nothing_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.inject import groups

    world: Any = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(ConfigError, match=r"computes on cpu, .*it has nccl for cuda.*with gloo"):
        groups.join(groups.Asked(tp_group=world), torch.device("cpu"))
    alone = SimpleNamespace(size=lambda: 1)
    assert groups.join(groups.Asked(tp_group=alone, pp_group=alone), torch.device("cpu")).everyone is None
