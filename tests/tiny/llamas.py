"""LLaMA and its kin."""

from __future__ import annotations

import copy
from typing import Any

import transformers as T

from tests.tiny.model import Tiny

BASE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "vocab_size": 67,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEW = int(T.__version__.split(".")[0]) >= 5
SLIDING, FULL = "sliding_attention", "full_attention"


def causal(name: str, *, config: str = "", attention: str = "sdpa", static: bool | None = True, **fields: Any) -> Tiny:
    """transformers' `name`ForCausalLM of BASE with other `fields`."""

    def make() -> T.PreTrainedModel:
        return getattr(T, f"{name}ForCausalLM")(
            getattr(T, f"{config or name}Config")(**{**BASE, **copy.deepcopy(fields)})
        )

    return Tiny(make, "decoder", attention=attention, static=static)


def scaled(kind: str, **fields: Any) -> dict[str, Any]:
    """Fields of a config that stretches positions; prompts and what follows reach beyond what it was made for."""
    return {"rope_theta": 500.0, "rope_scaling": {"rope_type": kind, **fields}}


LONG = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.1, 2.0, 3.0, 5.0]},
    # a text that crosses this while transformers 4 generates is read again, with a mask that shows it what is to come
    "original_max_position_embeddings": 16 if NEW else 8,
}

TINY: dict[str, Tiny] = {
    "llama": causal("Llama"),
    "llama-biased": causal("Llama", attention_bias=True, mlp_bias=True),
    "llama-tied": causal("Llama", tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=3),
    "llama-head_dim": causal("Llama", head_dim=14, num_attention_heads=4, num_key_value_heads=1, hidden_act="gelu"),
    "llama-linear": causal("Llama", **scaled("linear", factor=2.5)),
    "llama-dynamic": causal("Llama", **scaled("dynamic", factor=2.0), max_position_embeddings=10),
    "llama-llama3": causal(
        "Llama",
        **scaled(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8,
        ),
    ),
    "llama-yarn": causal("Llama", **scaled("yarn", factor=8.0, original_max_position_embeddings=8)),
    "mistral": causal("Mistral", sliding_window=8),
    "mistral-whole": causal("Mistral", sliding_window=None, head_dim=10),
    "ministral": causal("Ministral", head_dim=10, sliding_window=5, layer_types=[SLIDING, FULL, SLIDING]),
    "qwen2": causal("Qwen2"),
    "qwen2-window": causal("Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2-yarn": causal(
        "Qwen2",
        **scaled(
            "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16, beta_slow=2, attention_factor=0.9
        ),
    ),
    "qwen3": causal("Qwen3", head_dim=16),
    "qwen3-biased": causal("Qwen3", head_dim=6, attention_bias=True, tie_word_embeddings=True),
    "phi3": causal("Phi3"),
    "phi3-window": causal("Phi3", sliding_window=7, partial_rotary_factor=0.5),
    "phi3-longrope": causal("Phi3", **LONG),
    "smollm3": causal("SmolLM3", no_rope_layer_interval=2, num_hidden_layers=4),
    "smollm3-window": causal(
        "SmolLM3", no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5, mlp_bias=True
    ),
    "seed_oss": causal("SeedOss", head_dim=10),
    "seed_oss-out": causal("SeedOss", head_dim=8, attention_out_bias=True, mlp_bias=True),
    "arcee": causal("Arcee", mlp_bias=True, attention_bias=True),
    "helium": causal("Helium", head_dim=8, attention_bias=True),
    "ernie4_5": causal("Ernie4_5", head_dim=10, use_bias=True),
    "gemma": causal("Gemma", head_dim=10, num_key_value_heads=1),
    "gemma2": causal("Gemma2", attention="eager", head_dim=10, sliding_window=5, query_pre_attn_scalar=7),
    "gemma2-capped": causal(
        "Gemma2",
        attention="eager",
        head_dim=8,
        layer_types=[FULL] * 3,
        attention_bias=True,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=1.5,
    ),
    "vaultgemma": causal("VaultGemma", attention="eager", head_dim=12, sliding_window=5, query_pre_attn_scalar=7),
    "gemma3_text": causal(
        "Gemma3",
        config="Gemma3Text",
        head_dim=12,
        num_hidden_layers=5,
        sliding_window=5,
        layer_types=[SLIDING, SLIDING, FULL, SLIDING, FULL],
        query_pre_attn_scalar=9,
        rope_local_base_freq=50.0,
        **scaled("linear", factor=4.0),
    ),
    "cohere": causal("Cohere", logit_scale=0.3),
    "cohere-normed": causal("Cohere", use_qk_norm=True, attention_bias=True, tie_word_embeddings=False),
    "cohere2": causal("Cohere2", num_hidden_layers=4, sliding_window=5, layer_types=[SLIDING, FULL, SLIDING, FULL]),
    "olmo2": causal("Olmo2", num_attention_heads=3, num_key_value_heads=1),
    "olmo3": causal(
        "Olmo3",
        sliding_window=5,
        layer_types=[SLIDING, SLIDING, FULL],
        **scaled("yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "exaone4": causal("Exaone4", sliding_window=5, layer_types=[SLIDING, FULL, SLIDING]),
    "granite": causal(
        "Granite",
        embedding_multiplier=3.7,
        logits_scaling=2.2,
        residual_multiplier=0.22,
        attention_multiplier=0.3,
        mlp_bias=True,
    ),
    "glm": causal("Glm", head_dim=12),
    "glm4": causal("Glm4", head_dim=8, attention_bias=False),
    "nemotron": causal("Nemotron", head_dim=12, attention_bias=True, mlp_bias=True),
}
