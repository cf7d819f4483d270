"""LLaMA and its kin."""

from __future__ import annotations

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

TINY: dict[str, Tiny] = {
    "llama": Tiny(lambda: T.LlamaForCausalLM(T.LlamaConfig(**BASE)), "decoder"),
    "mistral": Tiny(lambda: T.MistralForCausalLM(T.MistralConfig(**BASE, sliding_window=8)), "decoder"),
    "qwen2": Tiny(lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**BASE)), "decoder"),
    "qwen3": Tiny(lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**BASE, head_dim=16)), "decoder"),
    "phi3": Tiny(lambda: T.Phi3ForCausalLM(T.Phi3Config(**BASE)), "decoder"),
}
