"""Where a Megatron checkpoint keeps each canonical parameter, and how its fused rows go."""

from __future__ import annotations

from hasten.weights import GROUPED, SEQUENTIAL, STRIDED, Dialect, Packed

VERSIONS = {0: SEQUENTIAL, 1: STRIDED, 2: GROUPED, 3: GROUPED}
"""The order of query_key_value's rows in a whole tensor, by checkpoint version: [3, heads, d], [heads, d, 3] or
[heads, 3, d] (with grouped queries: a group's queries, its key, its value). Version 3 changed other things."""


def dialect(version: int) -> Dialect:
    return Dialect(
        f"Megatron checkpoint, version {version}",
        "layers.{i}.",
        {
            "tokens": "embedding.word_embeddings",
            "positions": "embedding.position_embeddings",
            "types": "embedding.tokentype_embeddings",
            "final_norm": "final_layernorm",
            "head": "output_layer",
            "attn_norm": "input_layernorm",
            "mlp_norm": "pre_mlp_layernorm",
            "qkv": Packed("self_attention.linear_qkv", VERSIONS[version]),
            "q_norm": "self_attention.q_layernorm",
            "k_norm": "self_attention.k_layernorm",
            "out": "self_attention.linear_proj",
            "up": Packed("mlp.linear_fc1"),
            "down": "mlp.linear_fc2",
            "router": "mlp.router",
            "expert_up": "mlp.experts.{e}.linear_fc1",
            "expert_down": "mlp.experts.{e}.linear_fc2",
            "shared_up": Packed("mlp.shared_experts.linear_fc1"),
            "shared_down": "mlp.shared_experts.linear_fc2",
            "pooler": "pooler.dense",
            "mlm": "lm_head.dense",
            "mlm_norm": "lm_head.layer_norm",
            "mlm_logits": "output_layer",
            "pairs": "binary_head",
        },
    )
