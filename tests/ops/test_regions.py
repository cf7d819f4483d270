"""The references of regions and mixtures of experts against transformers and the formulas written out; in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from hasten.ops import (
    Matrix,
    NormLayer,
    experts,
    head,
    linear,
    project,
    qkv,
    rope,
    route,
    up,
    use,
)
from hasten.spec import Head, Mlp, Moe, Norm
from tests.ops.cases import CASES

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def references() -> object:
    with use("reference"):
        yield


def equal(got: Tensor, want: Tensor, bound: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE)


# ---- mixture of experts


def test_mixture_is_that_of_mixtral() -> None:
    config = MixtralConfig(hidden_size=12, intermediate_size=10, num_local_experts=5, num_experts_per_tok=2)
    theirs = MixtralSparseMoeBlock(config).double().eval()
    for p in theirs.parameters():
        p.data = random(*p.shape) / 2
    e = theirs.experts
    if hasattr(e, "gate_up_proj"):  # transformers 5 stacks them
        inner, outer = e.gate_up_proj, e.down_proj
    else:
        inner = torch.stack([torch.cat((one.w1.weight, one.w3.weight)) for one in e])
        outer = torch.stack([one.w2.weight for one in e])
    m, x = Moe(5, 2, Mlp(10, "silu", True, False), True), random(2, 3, 12)
    answer = theirs(x)
    want = answer[0] if isinstance(answer, tuple) else answer
    got = experts(
        x.flatten(0, 1), *route(x.flatten(0, 1), Matrix(theirs.gate.weight), m), Matrix(inner), Matrix(outer), m
    )
    equal(got.view_as(want), want, 1e-6)  # transformers takes the shares in float32


def test_mixture_is_that_of_gpt_oss() -> None:
    config = GptOssConfig(hidden_size=12, intermediate_size=10, num_local_experts=5, num_experts_per_tok=3)
    theirs = GptOssMLP(config).double().eval()
    for p in theirs.parameters():
        p.data = random(*p.shape) * 3
    e = theirs.experts
    halves = [torch.cat((t[..., ::2], t[..., 1::2]), -1) for t in (e.gate_up_proj, e.gate_up_proj_bias)]
    inner, outer = Matrix(halves[0].mT, halves[1]), Matrix(e.down_proj.mT, e.down_proj_bias)
    router = Matrix(theirs.router.weight, theirs.router.bias)
    m, x = Moe(5, 3, Mlp(10, "clamped_swiglu", True, True), True, router_bias=True), random(2, 3, 12)
    got = experts(x.flatten(0, 1), *route(x.flatten(0, 1), router, m), inner, outer, m)
    equal(got.view(2, 3, 12), theirs(x)[0], 1e-6)


def test_sigmoid_shares_are_not_divided_unless_asked() -> None:
    m = Moe(4, 2, Mlp(8, "silu", True, False), False, score="sigmoid")
    x, router = random(5, 6), Matrix(random(4, 6))
    scores = torch.sigmoid(x @ router.weight.T)
    shares, which = route(x, router, m)
    equal(shares, scores.sort(-1, descending=True).values[:, :2])
    equal(scores.gather(1, which), shares)
    equal(route(x, router, replace(m, renormalize=True))[0], shares / shares.sum(-1, keepdim=True))


# ---- regions, against the formulas written out


def test_linear_multiplies_in_the_wider_dtype_and_answers_in_that_of_x() -> None:
    x, m = torch.randn(5, 33).bfloat16(), Matrix(torch.randn(7, 33), torch.randn(7))
    assert linear(x, m).equal((x.float() @ m.weight.T + m.bias).bfloat16())


def test_qkv_is_norm_product_clip_norms_and_rotation_in_this_order() -> None:
    x, n, m, a, _, _, (cos, sin), _ = CASES["qkv"]["normalized and rotated"](DOUBLE)
    a, weight = replace(a, clip=0.8), (random(4, 8), random(2, 8))
    q_norm, k_norm = (NormLayer(Norm("rms", 1e-5), w) for w in weight)
    q, k, v = qkv(x, n, m, a, q_norm, k_norm, (cos, sin), None)
    y = (F.layer_norm(x, (17,), n.weight, n.bias, 1e-5) @ m.weight.T + m.bias).clamp(-0.8, 0.8)
    want_q, want_k, want_v = y[..., :32].view(2, 3, 4, 8), y[..., 32:48].view(2, 3, 2, 8), y[..., 48:].view(2, 3, 2, 8)
    want_q, want_k = (F.rms_norm(t, (8,), eps=1e-5) * w for t, w in ((want_q, weight[0]), (want_k, weight[1])))
    equal(q, rope(want_q, cos, sin, a.position))
    equal(k, rope(want_k, cos, sin, a.position))
    equal(v, want_v)


def test_qkv_keeps_keys_and_values_where_it_is_told() -> None:
    x, n, m, a, q_norm, k_norm, turn, into = CASES["qkv"]["into pages"](DOUBLE)
    before = into.keys.clone(), into.values.clone()
    q, *rest = qkv(x, n, m, a, q_norm, k_norm, turn, into)
    assert rest == [None, None]
    want_q, k, v = qkv(x, n, m, a, q_norm, k_norm, turn, None)
    equal(q, want_q)
    for pool, was, new in zip((into.keys, into.values), before, (k, v), strict=True):
        kept = into.slots >= 0
        assert 0 < kept.sum() < len(x)
        was.view(-1, 2, 8)[into.slots[kept]] = new[kept]
        equal(pool, was)


def test_norm_of_the_width_comes_before_the_heads_are_cut() -> None:
    x, n, m, a, q_norm, k_norm, *_ = CASES["qkv"]["norm of the width"](DOUBLE)
    q, k, _ = qkv(x, n, m, a, q_norm, k_norm, None, None)
    y = F.layer_norm(x, (24,), n.weight, n.bias, 1e-5) @ m.weight.T + m.bias
    equal(q.flatten(-2), F.rms_norm(y[..., :32], (32,), q_norm.weight, 1e-5))
    equal(k.flatten(-2), F.rms_norm(y[..., 32:48], (16,), k_norm.weight, 1e-5))


def test_project_is_outer_of_residual_plus_scaled_inner() -> None:
    x, m, residual, inner, outer, scale, layer_scale = CASES["project"]["everything"](DOUBLE)
    y = F.rms_norm(x @ m.weight.T + m.bias, (12,), inner.weight, 1e-5) * layer_scale * scale
    want = F.layer_norm(residual + y, (12,), outer.weight, outer.bias, 1e-5)
    equal(project(x, m, residual, inner, outer, scale, layer_scale), want)


@pytest.mark.parametrize("case", ["silu, gated", "gelu, many rows", "without norm"])
def test_up_is_norm_product_and_activation(case: str) -> None:
    x, before, m, mlp = CASES["up"][case](DOUBLE)
    y = x if before is None else F.layer_norm(x, (17,), before.weight, before.bias, 1e-5)
    y = y @ m.weight.T + m.bias
    equal(up(x, before, m, mlp), F.silu(y[..., :13]) * y[..., 13:] if mlp.gated else F.gelu(y))


def test_head_scales_before_and_caps_after() -> None:
    x, m = random(3, 17), Matrix(random(101, 17), random(101))
    want = 3.0 * torch.tanh((0.25 * x @ m.weight.T + m.bias) / 3.0)
    equal(head(x, None, m, Head(False, bias=True, scale=0.25, softcap=3.0)), want)
