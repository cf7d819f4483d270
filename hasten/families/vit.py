"""Vision transformers: ViT, DeiT, and those that change their training alone (arXiv 2010.11929, 2012.12877)."""

from __future__ import annotations

from collections.abc import Mapping

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.spec import Attention, Block, Mlp, Norm, Patches, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect
from hasten.weights.dialect import Stored

NORMS: Mapping[str, Stored] = {
    "attn_norm": "layernorm_before",
    "mlp_norm": "layernorm_after",
    "final_norm": "layernorm",
}
JOINED = Dialect(
    "vit",
    "layers.{i}.",
    {
        **NORMS,
        "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "out": "attention.o_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
)
NESTED = Dialect(
    "vit, as stored",  # and live before transformers 5
    "encoder.layer.{i}.",
    {
        **NORMS,
        "qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
        "out": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
)
POOLED = Seam(
    "image", keeps=("embeddings", "pooler"), stem=("embeddings",), pools="all", pooler=("pooler",), states="raw"
)
BARE = Seam("image", keeps=("embeddings",), stem=("embeddings",), states="raw")


def pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a config's size, which is one number for a square."""
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def patches(c: Config) -> Patches:
    return Patches(pair(c.take("patch_size")), pair(c.take("image_size")), c.take("num_channels"))


def norm(c: Config) -> Norm:
    return Norm("layer", c.take("layer_norm_eps"), bias=True)


def attention(c: Config, bias: str) -> Attention:
    heads = c.take("num_attention_heads")
    d = c.default("head_dim", c.take("hidden_size") // heads)
    return Attention(heads, heads, d, d**-0.5, causal=False, bias=bias)


def vit(c: Config) -> Tower:
    c.default("tie_word_embeddings", True)  # there are no words
    a = attention(c, "qkvo" if c.take("qkv_bias") else "o")
    b = Block(a, Mlp(c.take("intermediate_size"), act(c), gated=False, bias=True), norm(c), "pre")
    return Tower(c.take("hidden_size"), patches(c), (b,) * c.take("num_hidden_layers"), norm(c))


FAMILIES: dict[str, Family] = {
    "vit": one(vit, JOINED, NESTED, seam=POOLED, classes="ViT, DINO"),
    "deit": one(vit, JOINED, NESTED, seam=POOLED, classes="DeiT"),
    "ijepa": one(vit, JOINED, NESTED, seam=POOLED, classes="I-JEPA"),
    "vit_msn": one(vit, JOINED, NESTED, seam=BARE, classes="ViT-MSN"),
}
