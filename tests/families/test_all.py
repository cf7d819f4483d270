"""What holds for every family: the model keeps its names and values, half precision stays sane, revert is exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.inject.attach import attach
from hasten.spec import Moe
from tests.families.parity import tokens
from tests.tiny import TINY, build

every = pytest.mark.parametrize("name", TINY)


def call(name: str) -> dict[str, Any]:
    """Arguments of the model's forward."""
    own = TINY[name].own()
    return own if own else {"input_ids": tokens(name, (2, 9))}


@every
def test_state_dict_keeps_names_and_values_and_revert_is_exact(name: str) -> None:
    model = build(TINY[name])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    backbones = attach(model)
    for b in backbones:
        b.install()
    during = model.state_dict()
    assert list(during) == list(before)
    assert all(torch.equal(during[k], v) for k, v in before.items())
    for b in backbones:
        b.remove()
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].is_contiguous() for k, v in before.items())
    assert all("forward" not in vars(m) and "_apply" not in vars(m) for m in model.modules())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_no_more_than_transformers_own(name: str, dtype: torch.dtype) -> None:
    arguments = call(name)
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arguments.items()}
    with torch.no_grad():
        want = build(TINY[name])(**arguments)[0].float()
        model = build(TINY[name], dtype)
        theirs = model(**half)[0].float()
        backbones = attach(model)
        for b in backbones:
            b.install()
        ours = model(**half)[0].float()
    assert torch.isfinite(ours).all()
    routed = any(isinstance(block.mlp, Moe) for b in backbones for block in b.tower.blocks)
    allowed = _error(theirs, want, routed) * 1.5 + 1e-3
    assert _error(ours, want, routed) <= allowed


def _error(got: Tensor, want: Tensor, routed: bool) -> Tensor:
    """The root mean square over tokens; over the median token where rounding may send some to other experts."""
    square = (got - want).square().mean(-1)
    return (square.median() if routed else square.mean()).sqrt()


@every
def test_the_original_forward_still_serves_what_the_fused_one_does_not(name: str) -> None:
    arguments = call(name)
    model = build(TINY[name])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = copy.deepcopy(model)(**arguments, output_attentions=True)
        backbones = attach(model)
        for b in backbones:
            b.install()
        got = model(**arguments, output_attentions=True)
    assert sum(b.detours.total() for b in backbones) >= 1
    assert got.keys() == want.keys()
    torch.testing.assert_close(got[0], want[0], atol=3e-5, rtol=3e-5)


@every
def test_a_second_model_of_the_same_family_is_undisturbed(name: str) -> None:
    arguments = call(name)
    one, two = build(TINY[name]), build(TINY[name])
    with torch.no_grad():
        for p in two.parameters():
            p.mul_(0.5)
        want = [m(**arguments)[0] for m in (one, two)]
        for m in (one, two):
            for b in attach(m):
                b.install()
        got = [m(**arguments)[0] for m in (one, two, one)]
    for g, w in zip(got, [*want, want[0]], strict=True):
        torch.testing.assert_close(g, w, atol=3e-5, rtol=3e-5)
