"""GPT-OSS: sinks beside the scores, windows in every other layer, experts with biases and clamped gates."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.family import Family, one
from hasten.families.llama import DECODER, SLOTS, attention, bias, norm, stack
from hasten.spec import Block, Mlp, Moe, Tower
from hasten.spec.config import Config
from hasten.weights import STRIDED, Dialect, Packed

GPT_OSS = Dialect(
    "gpt_oss",
    "layers.{i}.",
    SLOTS
    | {
        "sinks": "self_attn.sinks",
        "router": "mlp.router",
        "expert_up": Packed("mlp.experts.gate_up_proj", STRIDED),
        "expert_down": "mlp.experts.down_proj",
    },
    transposed=frozenset({"expert_up", "expert_down"}),
)


def gpt_oss(c: Config) -> Tower:
    c.default("hidden_act", None)  # transformers has the clamped gate whatever this says
    for name, value in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        c.refuse(name, value, why="the clamped gate has these constants")
    expert = Mlp(c.take("intermediate_size"), "clamped_swiglu", gated=True, bias=True)
    m = Moe(c.take("num_local_experts"), c.take("num_experts_per_tok"), expert, renormalize=True, router_bias=True)
    n = replace(norm(c), wide=True)

    def block(i: int, kind: str) -> Block:
        return Block(replace(attention(c, kind, bias=bias(c)), sinks=True), m, n, "pre")

    return stack(c, block)


FAMILIES: dict[str, Family] = {"gpt_oss": one(gpt_oss, GPT_OSS, seam=DECODER, classes="GPT-OSS 20B and 120B")}
