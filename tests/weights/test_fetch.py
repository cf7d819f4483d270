"""From stored tensors to canonical ones and back, and what is said where they do not fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import transformers as T
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hasten.errors import WeightError
from hasten.families.moe import MIXTRAL, STACKED
from hasten.inject.attach import attach
from hasten.inject.loan import live_tensors
from hasten.spec import Tower
from hasten.weights import GROUPED, STRIDED, Dialect, Packed, fetch, params, resolve, stored
from hasten.weights.fetch import Binding
from tests.tiny import TINY, build
from tests.tiny.llamas import BASE
from tests.weights.towers import APART, FUSED, PLAIN, SLOTS, biased, canonical, routed, tower

EXPERTS = SLOTS | {
    "router": "m.router",
    "expert_up": Packed("m.experts.gate_up", STRIDED),
    "expert_down": "m.experts.down",
}
DIALECTS = {
    "apart": APART,
    "fused": FUSED,
    "grouped": Dialect("grouped", "blocks.{i}.", SLOTS | {"qkv": Packed("a.qkv", GROUPED)}),
    "transposed": Dialect("transposed", "blocks.{i}.", FUSED.slots, frozenset({"qkv", "out", "up", "down"})),
    "stacked experts": Dialect("stacked experts", "blocks.{i}.", EXPERTS),
    "transposed experts": Dialect(
        "transposed experts", "blocks.{i}.", EXPERTS, frozenset({"expert_up", "expert_down"})
    ),
    "single experts": Dialect(
        "single experts",
        "blocks.{i}.",
        EXPERTS | {"expert_up": ("m.{e}.gate", "m.{e}.up"), "expert_down": "m.{e}.down"},
    ),
}


def write(t: Tower, d: Dialect, weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A store of the weights in a dialect."""
    made: dict[str, Tensor] = {}
    for p in params(t):
        b = Binding(p, tuple(f"{n}.{p.kind}" for n in d.names(p, prefix)), d)
        made |= dict(zip(b.keys, (s.contiguous() for s in stored(b, weights[p.name])), strict=True))
    return made


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("letters", ["", "qkv", "qv", "k"])
@given(seed=st.integers(0, 2**31))
def test_fetch_reads_what_stored_wrote(name: str, letters: str, seed: int) -> None:
    torch.manual_seed(seed)
    d = DIALECTS[name]
    whole = letters and isinstance(d.slots["qkv"], Packed)  # a fused bias has all of its parts
    block = biased("qkv" if whole else letters)
    t = tower(replace(block, mlp=routed().mlp) if "experts" in name else block, PLAIN)
    weights = canonical(t)
    tensors = write(t, d, weights)
    found = {b.param.name: fetch(b, tensors) for b in resolve(t, [d], tensors, "")}
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[n], w) for n, w in weights.items())


@pytest.mark.parametrize("name", TINY)
def test_stored_gives_back_every_live_tensor(name: str) -> None:
    model = build(TINY[name])
    tensors = live_tensors(model)
    for backbone in attach(model):
        for b in backbone.bindings:
            whole = fetch(b, tensors)
            assert whole.shape == b.param.shape
            for k, t in zip(b.keys, stored(b, whole), strict=True):
                assert torch.equal(t.reshape(tensors[k].shape), tensors[k]), k


def test_an_absent_bias_is_zero() -> None:
    t = tower(biased("v"))
    tensors = write(t, APART, canonical(t))
    bias = next(fetch(b, tensors) for b in resolve(t, [APART], tensors, "") if b.param.name == "blocks.0.qkv.bias")
    assert not bias[: 12 + 6].any()
    assert torch.equal(bias[18:], tensors["blocks.0.a.v.bias"])


def test_transposed_slots_lie_with_their_columns_first_and_others_do_not() -> None:
    t = tower(biased("qkv"))
    weights = canonical(t)
    tensors = write(t, DIALECTS["transposed"], weights)
    assert torch.equal(tensors["blocks.0.a.qkv.weight"], weights["blocks.0.qkv.weight"].T)
    assert torch.equal(tensors["blocks.0.a.qkv.bias"], weights["blocks.0.qkv.bias"])
    assert torch.equal(tensors["embed.weight"], weights["tokens"])


def test_what_need_not_be_rearranged_is_not_copied() -> None:
    t = tower()
    tensors = write(t, FUSED, canonical(t))
    for b in resolve(t, [FUSED], tensors, ""):
        assert fetch(b, tensors).data_ptr() == tensors[b.keys[0]].data_ptr()


def test_parts_are_seen_as_views_of_the_canonical_tensor() -> None:
    t = tower()
    tensors = write(t, APART, canonical(t))
    for b in resolve(t, [APART], tensors, ""):
        whole = fetch(b, tensors)
        assert all(s.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for s in stored(b, whole))


def test_experts_stacked_or_single_are_the_same_weights() -> None:
    model = build(TINY["mixtral"])
    (backbone,) = attach(model)
    tensors = live_tensors(model)
    weights = {b.param.name: fetch(b, tensors) for b in backbone.bindings}
    for d in (STACKED, MIXTRAL):
        other = write(backbone.tower, d, weights, "model.")
        bindings = resolve(backbone.tower, [STACKED, MIXTRAL], other, "model.")
        assert {b.dialect.name for b in bindings} == {d.name}
        for b in bindings:
            assert torch.equal(fetch(b, other), weights[b.param.name])
    assert "model.layers.2.block_sparse_moe.experts.4.w3.weight" in other


def test_everything_missing_and_misshapen_is_said_at_once() -> None:
    t = tower()
    tensors = write(t, APART, canonical(t), "model.")
    del tensors["model.embed.weight"], tensors["model.blocks.1.a.k.weight"], tensors["head.weight"]
    tensors["model.blocks.0.m.down.weight"] = torch.zeros(10, 8)
    tensors["model.norm.weight"] = torch.zeros(9)
    with pytest.raises(WeightError) as caught:
        resolve(t, [FUSED, APART], tensors, "model.")
    said = str(caught.value)
    assert said.startswith("apart: 5 problems (other layouts: fused: 8 problems):\n")
    for line in (
        "no tensor model.embed.weight for tokens",
        "no tensor model.blocks.1.a.k.weight for blocks.1.qkv.weight",
        "no tensor head.weight for head.weight",
        "model.blocks.0.m.down.weight is (10, 8), the config says (10, 7)",
        "model.norm.weight is (9,), the config says (10,)",
    ):
        assert f"\n  {line}" in said


def test_a_layout_without_a_place_for_a_parameter_says_so() -> None:
    t = tower(routed())
    with pytest.raises(WeightError, match=r"no place known for blocks\.0\.router\.weight"):
        resolve(t, [APART], write(tower(), APART, canonical(tower())), "")


def test_a_long_list_of_problems_is_cut() -> None:
    with pytest.raises(WeightError, match=r"apart: 48 problems:(\n  no tensor .*){40}\n  \.\.\. and 8 more$"):
        resolve(tower(*(PLAIN,) * 5), [APART], {}, "")


def test_the_first_layout_that_fits_is_taken() -> None:
    t = tower()
    weights = canonical(t)
    both = write(t, FUSED, weights) | write(t, APART, weights)
    for order in ([APART, FUSED], [FUSED, APART]):
        assert {b.dialect.name for b in resolve(t, order, both, "")} == {order[0].name}


def test_parameters_that_the_description_does_not_know_are_refused() -> None:
    model = T.LlamaForCausalLM(T.LlamaConfig(**BASE))
    model.model.layers[1].self_attn.extra = nn.Linear(3, 2)
    message = "LlamaModel has parameters that its family does not know: " + ", ".join(
        f"model.layers.1.self_attn.extra.{kind}" for kind in ("bias", "weight")
    )
    with pytest.raises(WeightError, match=re.escape(message)):
        attach(model)


def test_a_live_model_that_contradicts_its_config_is_refused_and_left_alone() -> None:
    model = T.LlamaForCausalLM(T.LlamaConfig(**BASE))
    model.model.layers[2].mlp.down_proj = nn.Linear(57, 48, bias=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        WeightError, match=r"layers\.2\.mlp\.down_proj\.weight is \(48, 57\), the config says \(48, 56\)"
    ):
        attach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
