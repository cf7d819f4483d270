"""Mixtures of experts in LLaMA's shape: Mixtral, Qwen 2 and 3 MoE, OLMoE."""

from __future__ import annotations

from collections.abc import Callable
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


def experts(c: Config, width: str) -> Moe:
    """Routed experts, whose width is in the field `width`."""
    normalised = bool(c.default("norm_topk_prob", False))
    return Moe(c.take("num_experts", "num_local_experts"), c.take("num_experts_per_tok"), _expert(c, width), normalised)


def mixtral(c: Config) -> Tower:
    m = Moe(c.take("num_local_experts"), c.take("num_experts_per_tok"), mlp(c), renormalize=True)
    return stack(c, lambda i, kind: Block(attention(c, kind), m, norm(c), "pre"), windowed(c))


def qwen2_moe(c: Config) -> Tower:
    shared = _expert(c, "shared_expert_intermediate_size")
    m, sparse = replace(experts(c, "moe_intermediate_size"), shared=shared, shared_gate=True), _sparse(c)
    c.default("use_sliding_window", False, "max_window_layers")  # the window or layer_types say it again
    letters = "qkv" if c.default("qkv_bias", True) else ""

    def block(i: int, kind: str) -> Block:
        return Block(attention(c, kind, bias=letters), m if sparse(i) else mlp(c), norm(c), "pre")

    return stack(c, block, windowed(c))  # transformers 4 has no layer_types here, and one window for all


def qwen3_moe(c: Config) -> Tower:
    m, sparse = experts(c, "moe_intermediate_size"), _sparse(c)
    c.default("use_sliding_window", False)  # the window says it again

    def block(i: int, kind: str) -> Block:
        return Block(attention(c, kind, bias=bias(c), qk_norm=True), m if sparse(i) else mlp(c), norm(c), "pre")

    return stack(c, block, windowed(c))


def olmoe(c: Config) -> Tower:
    c.refuse("clip_qkv", why="OLMoE clips behind its norms of queries and keys, which has no description")
    a = replace(attention(c, bias=bias(c), qk_norm=True), qk_norm_span="width")
    return stack(c, lambda i, kind: Block(a, experts(c, "intermediate_size"), norm(c), "pre"))


def _expert(c: Config, width: str) -> Mlp:
    return Mlp(c.take(width), act(c), gated=True, bias=False)


def _sparse(c: Config) -> Callable[[int], bool]:
    """Which layers have experts; the others have a dense mlp."""
    dense, step = c.default("mlp_only_layers", []), c.default("decoder_sparse_step", 1)
    return lambda i: i not in dense and (i + 1) % step == 0


FAMILIES: dict[str, Family] = {
    "mixtral": one(mixtral, STACKED, MIXTRAL, seam=DECODER, classes="Mixtral 8x7B and 8x22B"),
    "qwen2_moe": one(qwen2_moe, STACKED, SINGLE, seam=DECODER, classes="Qwen 1.5 MoE, Qwen 2 MoE"),
    "qwen3_moe": one(qwen3_moe, STACKED, SINGLE, seam=DECODER, classes="Qwen 3 MoE"),
    "olmoe": one(olmoe, STACKED, SINGLE, seam=DECODER, classes="OLMoE"),
}
