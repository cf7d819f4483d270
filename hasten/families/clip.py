"""CLIP and SigLIP: a tower for texts, a tower for images, or one of both alone (arXiv 2103.00020, 2303.15343)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from hasten.families.bert import BERT, ENCODER, bert
from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.families.vit import attention, norm, patches
from hasten.spec import Block, Mlp, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

BLOCK = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": "self_attn.out_proj",
    "attn_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
TEXT = Dialect(
    "clip, text",
    "encoder.layers.{i}.",
    {
        **BLOCK,
        "tokens": "embeddings.token_embedding",
        "positions": "embeddings.position_embedding",
        "final_norm": "final_layer_norm",
    },
)
IMAGE = Dialect("clip, images", "encoder.layers.{i}.", {**BLOCK, "final_norm": "post_layernorm"})
CLIP_TEXT = Seam("encoder", ("text_model",), pools="eos", states="raw")
CLIP_IMAGE = Seam(
    "image",
    ("vision_model",),
    keeps=("embeddings", "pre_layrnorm", "post_layernorm"),
    pools="first",
    pooler=("post_layernorm",),  # of the pooled token alone
    stem=("embeddings", "pre_layrnorm"),
    states="raw",
)
SIGLIP_TEXT = Seam("encoder", ("text_model",), keeps=("head",), pools="last", pooler=("head",), states="raw")
SIGLIP_IMAGE = Seam(
    "image",
    ("vision_model",),
    keeps=("embeddings", "head"),
    pools="all",
    pooler=("head",),
    stem=("embeddings",),
    states="raw",
)


def block(c: Config, causal: bool) -> Block:
    c.default("tie_word_embeddings", True)  # there is no head over words
    m = Mlp(c.take("intermediate_size"), act(c), gated=False, bias=True)
    return Block(replace(attention(c, "qkvo"), causal=causal), m, norm(c), "pre")


def text(c: Config, causal: bool) -> Tower:
    e = Tokens(c.take("vocab_size"), c.take("hidden_size"), c.take("max_position_embeddings"))
    return Tower(e.width, e, (block(c, causal),) * c.take("num_hidden_layers"), norm(c))


def image(c: Config, normed: bool) -> Tower:
    final = norm(c) if normed else None
    return Tower(c.take("hidden_size"), patches(c), (block(c, False),) * c.take("num_hidden_layers"), final)


def clip_text(c: Config) -> Tower:
    return text(c, causal=True)


def clip_image(c: Config) -> Tower:
    return image(c, normed=False)


def siglip_text(c: Config) -> Tower:
    return text(c, causal=False)


def siglip_image(c: Config) -> Tower:
    return image(c, normed=True)


def both(
    texts: Callable[[Config], Tower], images: Callable[[Config], Tower]
) -> Callable[[Config], Mapping[str, Tower]]:
    """What describes a config that holds one config for each tower."""

    def describe(c: Config) -> Mapping[str, Tower]:
        c.default("tie_word_embeddings", True)
        t, i = c.part("text_config"), c.part("vision_config")
        towers = {"text": texts(t), "image": images(i)}
        t.finish()
        i.finish()
        return towers

    return describe


def alone(describe: Callable[[Config], Tower], d: Dialect, s: Seam, classes: str) -> Family:
    """One of the towers without the other; its backbone is a part of the model or the model itself."""
    return one(describe, d, seam=replace(s, path=(*s.path, "")), classes=classes)


CLIP_SEAMS = {"text": CLIP_TEXT, "image": CLIP_IMAGE}
SIGLIP_SEAMS = {"text": SIGLIP_TEXT, "image": SIGLIP_IMAGE}
CHINESE_SEAMS = {"text": replace(ENCODER, path=("text_model",)), "image": CLIP_IMAGE}
NAMES = {"text": (TEXT,), "image": (IMAGE,)}
CHINESE_NAMES = {"text": (BERT,), "image": (IMAGE,)}

FAMILIES: dict[str, Family] = {
    "clip": Family(both(clip_text, clip_image), NAMES, CLIP_SEAMS, "CLIP"),
    "clip_text_model": alone(clip_text, TEXT, CLIP_TEXT, "CLIP's text tower"),
    "clip_vision_model": alone(clip_image, IMAGE, CLIP_IMAGE, "CLIP's vision tower"),
    "siglip": Family(both(siglip_text, siglip_image), NAMES, SIGLIP_SEAMS, "SigLIP"),
    "siglip_text_model": alone(siglip_text, TEXT, SIGLIP_TEXT, "SigLIP's text tower"),
    "siglip_vision_model": alone(siglip_image, IMAGE, SIGLIP_IMAGE, "SigLIP's vision tower"),
    "chinese_clip": Family(both(bert, clip_image), CHINESE_NAMES, CHINESE_SEAMS, "Chinese CLIP"),
}
