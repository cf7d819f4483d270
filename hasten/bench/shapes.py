"""Models of well-known shapes with random weights, made here: speed does not depend on their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _llama(**shape: Any) -> Any:
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


def _gpt2(**shape: Any) -> Any:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))


def _bert(**shape: Any) -> Any:
    import transformers

    return transformers.BertModel(transformers.BertConfig(**shape))


DECODERS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,  # 124M
    "gpt2-medium": lambda: _gpt2(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-xl": lambda: _gpt2(n_embd=1600, n_layer=48, n_head=25),
    "llama-3.2-1b": lambda: _llama(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert-base": _bert,  # 110M
    "bert-large": lambda: _bert(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "minilm": lambda: _bert(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
}


def make(name: str, dtype: torch.dtype) -> Any:
    """A model of a shape in DECODERS or ENCODERS, with random weights, in eval."""
    torch.manual_seed(0)
    return (DECODERS | ENCODERS)[name]().to(dtype).eval()
