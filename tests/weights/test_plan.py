"""The plan of a tower's parameters is complete, says nothing twice, and says nothing that is not used."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from hasten.inject.attach import attach
from hasten.inject.loan import live_tensors
from hasten.model import Dense, Transformer
from hasten.spec import Norm
from hasten.weights import Param, fetch, params
from tests.tiny import TINY, build
from tests.weights.towers import ATTENTION, MLP, PLAIN, routed, tower

DECODERS = [n for n, t in TINY.items() if t.kind == "decoder"]
USED = [
    "llama-biased",
    "qwen3",
    "gemma2",
    "cohere-normed",
    "olmo2",
    "gpt_oss",
    "qwen2_moe-alternate",
    "granitemoeshared",
]


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_of_a_backbone_is_in_the_plan_once(name: str) -> None:
    model = build(TINY[name])
    for backbone in attach(model):
        named = Counter(p.name for p in params(backbone.tower))
        assert set(named.values()) == {1}
        bound = [b.param for b in backbone.bindings]
        assert [p.name for p in bound] == list(named)


@pytest.mark.parametrize("name", DECODERS)
def test_the_numbers_in_the_plan_are_the_numbers_in_the_model(name: str) -> None:
    model = build(TINY[name])
    (backbone,) = attach(model)
    tensors = live_tensors(model)
    there = {p.data_ptr(): p.numel() for p in model.parameters()}
    there |= {tensors[k].data_ptr(): tensors[k].numel() for b in backbone.bindings for k in b.keys}  # buffers too
    planned = sum(torch.Size(p.shape).numel() - _absent(p) for p in params(backbone.tower))
    assert planned == sum(there.values())


def _absent(p: Param) -> int:
    return sum(rows for rows, gone in zip(p.parts, p.absent, strict=True) if gone) if p.absent else 0


@pytest.mark.parametrize("name", USED)
def test_every_parameter_in_the_plan_changes_what_the_tower_computes(name: str) -> None:
    model = build(TINY[name])
    (backbone,) = attach(model)
    tensors = live_tensors(model)
    weights = {b.param.name: fetch(b, tensors).detach().clone() for b in backbone.bindings}
    ids, positions = torch.randint(3, 64, (2, 9)), torch.arange(9)[None]

    def logits() -> torch.Tensor:
        t = Transformer(backbone.tower, weights)
        return t.logits(t.finish(t.blocks(t.embed(ids, positions), Dense(positions))))

    with torch.no_grad():
        before = logits()
        for n, w in weights.items():
            kept = w.clone()
            w.add_(torch.randn_like(w))
            assert (logits() - before).abs().max() > 1e-5, n
            w.copy_(kept)


@pytest.mark.parametrize(
    ("order", "norms"),
    [
        ("pre", ["attn_norm", "mlp_norm"]),
        ("post", ["attn_norm", "mlp_norm"]),
        ("reordered", ["attn_norm", "mlp_norm"]),
        ("parallel", ["attn_norm", "mlp_norm"]),
        ("parallel-shared", ["attn_norm"]),
        ("sandwich", ["attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm"]),
    ],
)
def test_an_order_has_its_norms(order: str, norms: list[str]) -> None:
    t = tower(replace(PLAIN, order=order))  # pyright: ignore[reportArgumentType]
    assert [p.slot for p in params(t) if p.block == 0 and p.slot.endswith("norm")] == norms


@pytest.mark.parametrize(
    ("span", "shapes"), [("head", [(3,), (3,)]), ("heads", [(4, 3), (2, 3)]), ("width", [(12,), (6,)])]
)
def test_norms_of_queries_and_keys_span_what_the_description_says(span: str, shapes: list[tuple[int, ...]]) -> None:
    a = replace(ATTENTION, qk_norm=Norm("rms", 1e-6), qk_norm_span=span)  # pyright: ignore[reportArgumentType]
    found = {p.slot: p.shape for p in params(tower(replace(PLAIN, attention=a)))}
    assert [found["q_norm"], found["k_norm"]] == shapes


def test_experts_are_stacked_and_have_slots_of_their_own() -> None:
    shapes = {p.name: (p.slot, p.shape) for p in params(tower(PLAIN, routed(3)))}
    assert shapes["blocks.0.up.weight"] == ("up", (14, 10))
    assert shapes["blocks.1.up.weight"] == ("expert_up", (3, 10, 10))
    assert shapes["blocks.1.up.bias"] == ("expert_up", (3, 10))
    assert shapes["blocks.1.down.weight"] == ("expert_down", (3, 10, 5))
    assert shapes["blocks.1.router.bias"] == ("router", (3,))


def test_a_gate_doubles_the_rows_that_go_up() -> None:
    plain = tower(replace(PLAIN, mlp=replace(MLP, gated=False, bias=True)))
    shapes = {p.name: p.shape for p in params(plain)}
    assert shapes["blocks.0.up.weight"] == (7, 10)
    assert shapes["blocks.0.up.bias"] == (7,)
    assert shapes["blocks.0.down.bias"] == (10,)
