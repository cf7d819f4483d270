"""Mixtures of experts in LLaMA's shape: Mixtral, Qwen 2 and 3 MoE, OLMoE."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.family import Family, one
from hasten.families.fields import act
from hasten.families.llama import DECODER, SLOTS, attention, bias, mlp, norm, stack, windowed
from hasten.spec import Block, Mlp, Moe, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect, Packed

SHARED = {
    "shared_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "shared_down": "mlp.shared_expert.down_proj",
    "shared_gate": "mlp.shared_expert_gate",
}
STACKED = Dialect(
    "experts stacked",
    "layers.{i}.",
    SLOTS
    | SHARED
    | {"router": "mlp.gate", "expert_up": Packed("mlp.experts.gate_up_proj"), "expert_down": "mlp.experts.down_proj"},
)
SINGLE = Dialect(
    "experts one by one",
    "layers.{i}.",
    SLOTS
    | SHARED
    | {
        "router": "mlp.gate",
        "expert_up": ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"),
        "expert_down": "mlp.experts.{e}.down_proj",
    },
)
MIXTRAL = Dialect(
    "mixtral, experts one by one",
    "layers.{i}.",
    SLOTS
    | {
        "router": "block_sparse_moe.gate",
        "expert_up": ("block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"),
        "expert_down": "block_sparse_moe.experts.{e}.w2",
    },
)


def mixtral(c: Config) -> Tower:
    m = Moe(c.take("num_local_experts"), c.take("num_experts_per_tok"), mlp(c), renormalize=True)
    return stack(c, lambda i, kind: Block(attention(c, kind), m, norm(c), "pre"), windowed(c))


def qwen2_moe(c: Config) -> Tower:
    m = replace(experts(c), shared=_gated(c, "shared_expert_intermediate_size"), shared_gate=True)
    c.default("use_sliding_window", False, "max_window_layers")  # layer_types says it again
    letters = "qkv" if c.default("qkv_bias", True) else ""
    sparse = _sparse(c)
    otherwise = windowed(c)  # transformers 4 has no layer_types, and one window for all
    return stack(c, lambda i, k: Block(attention(c, k, bias=letters), m if sparse(i) else mlp(c), norm(c), "pre"), otherwise)


def qwen3_moe(c: Config) -> Tower:
    m, sparse = experts(c), _sparse(c)
    c.default("use_sliding_window", False)  # sliding_window is absent where it is False

    def block(i: int, kind: str) -> Block:
        return Block(attention(c, kind, bias=bias(c), qk_norm=True), m if sparse(i) else mlp(c), norm(c), "pre")

    return stack(c, block, windowed(c))


def olmoe(c: Config) -> Tower:
    c.refuse("clip_qkv", why="OLMoE would clip behind its norms of queries and keys, which has no description")
    m = replace(experts(c), expert=mlp(c))
    a = replace(attention(c, bias=bias(c), qk_norm=True), qk_norm_span="width")
    return stack(c, lambda i, kind: Block(a, m, norm(c), "pre"))


def experts(c: Config) -> Moe:
    """Routed experts of their own width, whose shares are normalised where the config says so."""
    expert = _gated(c, "moe_intermediate_size" if c.default("moe_intermediate_size", None) else "intermediate_size")
    normalised = bool(c.default("norm_topk_prob", False))
    return Moe(c.take("num_experts"), c.take("num_experts_per_tok"), expert, normalised)


def _gated(c: Config, width: str) -> Mlp:
    return Mlp(c.take(width), act(c), gated=True, bias=False)
