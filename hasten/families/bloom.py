"""BLOOM: positions by distance (alibi), a norm behind the embedding, fused query, key and value head by head."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.spec import Alibi, Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import GROUPED, Dialect, Packed

BLOOM = Dialect(
    "bloom",
    "h.{i}.",
    {
        "tokens": "word_embeddings",
        "embed_norm": "word_embeddings_layernorm",
        "final_norm": "ln_f",
        "head": "/lm_head",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "qkv": Packed("self_attention.query_key_value", GROUPED),
        "out": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
)


def bloom(c: Config) -> Tower:
    c.refuse("apply_residual_connection_post_layernorm", False, why="residuals behind the norm have no description")
    n, width, heads = Norm("layer", c.take("layer_norm_epsilon"), bias=True), c.take("hidden_size"), c.take("n_head")
    d = width // heads
    a = Attention(heads, heads, d, d**-0.5, causal=True, bias="qkvo", position=Alibi())
    b = Block(a, Mlp(4 * width, "gelu_tanh", gated=False, bias=True), n, "pre")
    head = Head(tied=bool(c.default("tie_word_embeddings", True)))
    return Tower(width, Tokens(c.take("vocab_size"), width, norm=n), (b,) * c.take("n_layer"), n, head)


FAMILIES: dict[str, Family] = {"bloom": one(bloom, BLOOM, seam=Seam("decoder"), classes="BLOOM, BLOOMZ")}
