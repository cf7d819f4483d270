"""Mixtures of experts."""

from __future__ import annotations

from tests.tiny.llamas import NEW, causal, scaled
from tests.tiny.model import Tiny

QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ALTERNATE = {"decoder_sparse_step": 2, "norm_topk_prob": True, "num_hidden_layers": 5, "mlp_only_layers": [3]}
MULTIPLIED = {
    "embedding_multiplier": 3.5,
    "logits_scaling": 2.2,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
}

TINY: dict[str, Tiny] = {
    "mixtral": causal("Mixtral", num_local_experts=5, num_experts_per_tok=3),
    "mixtral-window": causal("Mixtral", num_local_experts=3, num_experts_per_tok=1, sliding_window=6, head_dim=10),
    "qwen2_moe": causal("Qwen2Moe", **QWEN, shared_expert_intermediate_size=24),
    "qwen2_moe-alternate": causal(
        "Qwen2Moe", **QWEN, **ALTERNATE, shared_expert_intermediate_size=12, qkv_bias=False, num_key_value_heads=6
    ),
    "qwen3_moe": causal("Qwen3Moe", **QWEN, head_dim=10),
    "qwen3_moe-alternate": causal(
        "Qwen3Moe", **QWEN, **ALTERNATE, head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=5
    ),
    "olmoe": causal("Olmoe", static=NEW or None, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True),
    "flex_olmo": causal("FlexOlmo", num_experts=5, num_experts_per_tok=2, num_attention_heads=4),
    "gpt_oss": causal(
        "GptOss",
        attention="eager",
        num_local_experts=5,
        num_experts_per_tok=2,
        head_dim=16,
        sliding_window=5,
        **scaled("yarn", factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=8),
    ),
    "granitemoe": causal("GraniteMoe", **MULTIPLIED, num_local_experts=5, num_experts_per_tok=2),
    "granitemoeshared": causal("GraniteMoeShared", **MULTIPLIED, num_local_experts=5, shared_intermediate_size=28),
}
if NEW:  # before, transformers builds masks for this window that its own caches contradict
    TINY["qwen2_moe-window"] = causal(
        "Qwen2Moe",
        **QWEN,
        shared_expert_intermediate_size=24,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    )
