"""DINOv2, with registers or without: ViT with a learned scale on each sublayer (arXiv 2304.07193, 2309.16588)."""

from __future__ import annotations

from collections.abc import Mapping

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.families.vit import attention, norm, patches
from hasten.spec import Block, Mlp, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect, Packed
from hasten.weights.dialect import Stored

SHARED: Mapping[str, Stored] = {
    "attn_norm": "norm1",
    "mlp_norm": "norm2",
    "attn_scale": "layer_scale1.lambda1",
    "mlp_scale": "layer_scale2.lambda1",
    "final_norm": "layernorm",
}
JOINED: Mapping[str, Stored] = {
    "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "out": "attention.o_proj",
}
NESTED: Mapping[str, Stored] = {
    "qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "out": "attention.output.dense",
}
PLAIN: Mapping[str, Stored] = {"up": "mlp.fc1", "down": "mlp.fc2"}
GATED: Mapping[str, Stored] = {"up": ("mlp.gate_proj", "mlp.up_proj"), "down": "mlp.down_proj"}
GATED_PACKED: Mapping[str, Stored] = {"up": Packed("mlp.weights_in"), "down": "mlp.weights_out"}
BLOCK = "encoder.layer.{i}."
DINOV2 = (
    Dialect("dinov2", BLOCK, {**SHARED, **JOINED, **PLAIN}),
    Dialect("dinov2 with a gated mlp", BLOCK, {**SHARED, **JOINED, **GATED}),
    Dialect("dinov2, as stored", BLOCK, {**SHARED, **NESTED, **PLAIN}),  # and live before transformers 5
    Dialect("dinov2 with a gated mlp, as stored", BLOCK, {**SHARED, **NESTED, **GATED_PACKED}),
)
SEAM = Seam("image", keeps=("embeddings",), stem=("embeddings",), pools="first", states="raw")


def dinov2(c: Config) -> Tower:
    c.default("tie_word_embeddings", True)  # there are no words
    width = c.take("hidden_size")
    b = Block(attention(c, "qkvo" if c.take("qkv_bias") else "o"), mlp(c, width), norm(c), "pre", layer_scale=True)
    return Tower(width, patches(c), (b,) * c.take("num_hidden_layers"), norm(c))


def mlp(c: Config, width: int) -> Mlp:
    """A gated mlp has two thirds of the width of a plain one, rounded up to a multiple of 8."""
    wide = int(width * c.take("mlp_ratio"))
    plain = Mlp(wide, act(c), gated=False, bias=True)
    if not c.take("use_swiglu_ffn"):
        return plain
    return Mlp((int(wide * 2 / 3) + 7) // 8 * 8, "silu", gated=True, bias=True)


FAMILIES: dict[str, Family] = {
    "dinov2": one(dinov2, *DINOV2, seam=SEAM, classes="DINOv2"),
    "dinov2_with_registers": one(dinov2, *DINOV2, seam=SEAM, classes="DINOv2 with registers"),
}
