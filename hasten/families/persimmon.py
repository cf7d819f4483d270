"""Persimmon: GPT-NeoX one sublayer behind the other, with squared relu and norms of queries and keys."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act, rope
from hasten.spec import Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import GROUPED, Dialect, Packed

PERSIMMON = Dialect(
    "persimmon",
    "layers.{i}.",
    {
        "tokens": "embed_tokens",
        "final_norm": "final_layernorm",
        "head": "/lm_head",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "qkv": Packed("self_attn.query_key_value", GROUPED),
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
        "out": "self_attn.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
)


def persimmon(c: Config) -> Tower:
    n, width, heads = (
        Norm("layer", c.take("layer_norm_eps"), bias=True),
        c.take("hidden_size"),
        c.take("num_attention_heads"),
    )
    d = width // heads
    a = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=d,
        scale=d**-0.5,
        causal=True,
        bias="qkvo",
        position=rope(c, d, share=0.5),
        qk_norm=n if c.take("qk_layernorm") else None,
    )
    b = Block(a, Mlp(c.take("intermediate_size"), act(c), gated=False, bias=True), n, "pre")
    head = Head(tied=bool(c.default("tie_word_embeddings", False)))
    return Tower(width, Tokens(c.take("vocab_size"), width), (b,) * c.take("num_hidden_layers"), n, head)


FAMILIES: dict[str, Family] = {"persimmon": one(persimmon, PERSIMMON, seam=Seam("decoder"), classes="Persimmon 8B")}
