"""MPT: alibi, no bias anywhere, query, key and value clamped in some checkpoints."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.spec import Alibi, Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect, Packed

MPT = Dialect(
    "mpt",
    "blocks.{i}.",
    {
        "tokens": "wte",
        "final_norm": "norm_f",
        "head": "/lm_head",
        "attn_norm": "norm_1",
        "mlp_norm": "norm_2",
        "qkv": Packed("attn.Wqkv"),
        "out": "attn.out_proj",
        "up": "ffn.up_proj",
        "down": "ffn.down_proj",
    },
)
IGNORED = "transformers' MPT ignores it, so that its output would not be the checkpoint's"


def attention(c: Config, width: int, heads: int) -> Attention:
    """From `attn_config`."""
    c.default("tie_word_embeddings", True)  # transformers 4 gives it to nested configs too; the outer one counts
    c.refuse("attn_type", "multihead_attention", why=IGNORED)
    c.refuse("alibi", True, why=IGNORED)
    c.refuse("alibi_bias_max", 8, why=IGNORED)
    c.refuse("qk_ln", False, why=IGNORED)
    c.refuse("prefix_lm", False, why=IGNORED)
    d = width // heads
    scale = c.default("softmax_scale", d**-0.5)
    clip = c.default("clip_qkv", None) or None
    return Attention(heads, heads, d, scale, causal=True, bias="", position=Alibi(), clip=clip)


def mpt(c: Config) -> Tower:
    c.refuse("expansion_ratio", 4, why=IGNORED)
    c.refuse("logit_scale", why=IGNORED)
    c.refuse("no_bias", True, why=IGNORED)
    width, heads, inner = c.take("d_model"), c.take("n_heads"), c.part("attn_config")
    n = Norm("layer", c.take("layer_norm_epsilon"))
    b = Block(attention(inner, width, heads), Mlp(4 * width, "gelu", gated=False, bias=False), n, "pre")
    inner.finish()
    head = Head(tied=bool(c.default("tie_word_embeddings", True)))
    return Tower(width, Tokens(c.take("vocab_size"), width), (b,) * c.take("n_layers"), n, head)


FAMILIES: dict[str, Family] = {"mpt": one(mpt, MPT, seam=Seam("decoder"), classes="MPT 7B, 30B")}
