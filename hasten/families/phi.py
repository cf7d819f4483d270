"""Phi-1, 1.5 and 2: one norm for both sublayers, biases everywhere, rotary over a part of each head."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act, rope
from hasten.spec import Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

PHI = Dialect(
    "phi",
    "layers.{i}.",
    {
        "tokens": "embed_tokens",
        "final_norm": "final_layernorm",
        "head": "/lm_head",
        "attn_norm": "input_layernorm",
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
        "out": "self_attn.dense",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
)


def phi(c: Config) -> Tower:
    n, width, heads = (
        Norm("layer", c.take("layer_norm_eps"), bias=True),
        c.take("hidden_size"),
        c.take("num_attention_heads"),
    )
    d = width // heads
    a = Attention(
        heads=heads,
        kv_heads=c.default("num_key_value_heads", heads),
        head_dim=d,
        scale=d**-0.5,
        causal=True,
        bias="qkvo",
        position=rope(c, d, share=0.5),
        qk_norm=n if c.default("qk_layernorm", False) else None,
    )
    b = Block(a, Mlp(c.take("intermediate_size"), act(c), gated=False, bias=True), n, "parallel-shared")
    head = Head(tied=bool(c.default("tie_word_embeddings", False)), bias=True)
    return Tower(width, Tokens(c.take("vocab_size"), width), (b,) * c.take("num_hidden_layers"), n, head)


FAMILIES: dict[str, Family] = {"phi": one(phi, PHI, seam=Seam("decoder"), classes="Phi-1, Phi-1.5, Phi-2")}
