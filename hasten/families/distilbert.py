"""DistilBERT: BERT's block and embeddings without token types and pooler (arXiv 1910.01108)."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.spec import Attention, Block, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

DISTILBERT = Dialect(
    "distilbert",
    "transformer.layer.{i}.",
    {
        "tokens": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "embed_norm": "embeddings.LayerNorm",
        "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "out": "attention.out_lin",
        "attn_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "mlp_norm": "output_layer_norm",
    },
)
EPS = 1e-12  # of every norm; no config field says so


def distilbert(c: Config) -> Tower:
    c.default("tie_word_embeddings", True)  # the head stays the model's own
    c.default("tie_weights_", True)
    width, heads = c.take("dim", "hidden_size"), c.take("n_heads", "num_attention_heads")
    n, d = Norm("layer", EPS, bias=True), width // heads
    a = Attention(heads, heads, d, d**-0.5, causal=False, bias="qkvo")
    b = Block(a, Mlp(c.take("hidden_dim"), act(c, "activation"), gated=False, bias=True), n, "post")
    e = Tokens(c.take("vocab_size"), width, c.take("max_position_embeddings"), norm=n)
    return Tower(width, e, (b,) * c.take("n_layers", "num_hidden_layers"), None)


FAMILIES: dict[str, Family] = {
    "distilbert": one(distilbert, DISTILBERT, seam=Seam("encoder"), classes="DistilBERT"),
}
