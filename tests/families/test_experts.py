"""What is particular to mixtures of experts: who routes, and how their weights lie."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from hasten import ops
from hasten.inject.attach import attach
from hasten.model.layer import Experts
from hasten.spec import Mlp, Moe
from tests.families.parity import same, tokens
from tests.tiny import TINY, build, experts

ROUTED = list(experts.TINY)


@pytest.mark.parametrize("name", ROUTED)
def test_router_logits_are_the_models_own(name: str) -> None:
    """Asked for them, the original forward serves, and says so."""
    theirs = build(TINY[name])
    ours = copy.deepcopy(theirs)
    (backbone,) = attach(ours)
    backbone.install()
    arguments = {"input_ids": tokens(name, (2, 7)), "output_router_logits": True, "use_cache": False}
    with torch.no_grad():
        want, got = theirs(**arguments), ours(**arguments)
    assert want.router_logits
    assert backbone.detours == {"output_router_logits was given": 1}
    same(got, want)


@pytest.mark.parametrize("name", ROUTED)
def test_grouped_experts_equal_those_that_see_every_token(name: str) -> None:
    (backbone,) = attach(build(TINY[name]))
    backbone.install()
    for layer in backbone.transformer.layers:
        if not isinstance(m := layer.mlp, Experts):
            continue
        for tokens_ in (1, 13):
            x = torch.randn(tokens_, backbone.tower.width)
            shares, which = ops.route(x, m.router, m.spec)
            arguments = x, shares, which, m.up, m.down, m.spec
            torch.testing.assert_close(ops.experts(*arguments), ops.experts.reference(*arguments), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_moe-alternate", "qwen3_moe-alternate"])
def test_only_the_layers_that_the_config_names_are_sparse(name: str) -> None:
    (backbone,) = attach(build(TINY[name]))
    kinds = [type(b.mlp) for b in backbone.tower.blocks]
    assert kinds == [Mlp, Moe, Mlp, Mlp, Mlp]  # every second one, but not the fourth


@pytest.mark.parametrize("renormalize", [True, False])
def test_shares_sum_to_one_where_they_are_normalised(renormalize: bool) -> None:
    (backbone,) = attach(build(TINY["mixtral"]))
    backbone.install()
    m = backbone.transformer.layers[0].mlp
    assert isinstance(m, Experts)
    shares, which = ops.route(torch.randn(9, backbone.tower.width), m.router, replace(m.spec, renormalize=renormalize))
    assert which.shape == (9, 3)
    assert torch.allclose(shares.sum(-1), torch.ones(9)) is renormalize
