"""GPT-like decoders."""

from __future__ import annotations

import transformers as T

from tests.tiny.model import Tiny

TINY: dict[str, Tiny] = {
    "gpt2": Tiny(
        lambda: T.GPT2LMHeadModel(
            T.GPT2Config(n_embd=36, n_layer=3, n_head=3, vocab_size=67, n_positions=64, bos_token_id=1, eos_token_id=2)
        ),
        "decoder",
    ),
    "gpt_neox": Tiny(
        lambda: T.GPTNeoXForCausalLM(
            T.GPTNeoXConfig(
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=3,
                vocab_size=67,
                intermediate_size=40,
                max_position_embeddings=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "decoder",
    ),
}
