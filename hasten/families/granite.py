"""IBM's Granite: LLaMA with four multipliers, dense or with experts."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.family import Family, one
from hasten.families.fields import act
from hasten.families.llama import DECODER, LLAMA, SLOTS, attention, bias, head, mlp, norm, stack, tokens
from hasten.spec import Block, Mlp, Moe, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect, Packed

SHARED = {"shared_up": Packed("shared_mlp.input_linear"), "shared_down": "shared_mlp.output_linear"}
EXPERTS = Dialect(
    "granite, experts",
    "layers.{i}.",
    SLOTS
    | SHARED
    | {
        "router": "block_sparse_moe.router",
        "expert_up": Packed("block_sparse_moe.experts.gate_up_proj"),
        "expert_down": "block_sparse_moe.experts.down_proj",
    },
)
LINEARS = Dialect(
    "granite, experts as linears",
    "layers.{i}.",
    SLOTS
    | SHARED
    | {
        "router": "block_sparse_moe.router.layer",
        "expert_up": Packed("block_sparse_moe.input_linear"),
        "expert_down": "block_sparse_moe.output_linear",
    },
)


def granite(c: Config) -> Tower:
    return _tower(c, mlp(c))


def granite_moe(c: Config) -> Tower:
    return _tower(c, _experts(c))


def granite_moe_shared(c: Config) -> Tower:
    width = c.default("shared_intermediate_size", 0)
    return _tower(c, replace(_experts(c), shared=Mlp(width, act(c), gated=True, bias=False) if width else None))


def _experts(c: Config) -> Moe:
    return Moe(c.take("num_local_experts"), c.take("num_experts_per_tok"), mlp(c), renormalize=True)


def _tower(c: Config, m: Mlp | Moe) -> Tower:
    c.refuse("position_embedding_type", "rope", why="Granite without rotary positions has no description")
    a = replace(attention(c, bias=bias(c)), scale=float(c.take("attention_multiplier")))
    b = Block(a, m, norm(c), "pre", residual=float(c.take("residual_multiplier")))
    t = stack(c, lambda i, kind: b)
    embed = tokens(c, float(c.take("embedding_multiplier")))
    return replace(t, embed=embed, head=head(c, 1.0 / c.take("logits_scaling")))


FAMILIES: dict[str, Family] = {
    "granite": one(granite, LLAMA, seam=DECODER, classes="Granite 3 (dense)"),
    "granitemoe": one(granite_moe, EXPERTS, LINEARS, seam=DECODER, classes="Granite 3 (experts)"),
    "granitemoeshared": one(granite_moe_shared, EXPERTS, LINEARS, seam=DECODER, classes="Granite 3 (shared expert)"),
}
