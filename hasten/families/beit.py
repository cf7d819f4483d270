"""BEiT and Data2Vec vision: ViT with learned biases by two-dimensional distance (arXiv 2106.08254, 2202.03555).

The biases are made by the model's own modules, which also stretch their tables to images of other sizes.
"""

from __future__ import annotations

from collections.abc import Mapping

from hasten.families import vit
from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.spec import Block, Mlp, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect
from hasten.weights.dialect import Stored

SCALES: Mapping[str, Stored] = {"attn_scale": "lambda_1", "mlp_scale": "lambda_2"}
JOINED = Dialect("beit", vit.JOINED.block, {**vit.JOINED.slots, **SCALES})
NESTED = Dialect("beit, as stored", vit.NESTED.block, {**vit.NESTED.slots, **SCALES})
BIASES = (
    "layers.{i}.relative_position_bias",
    "shared_position_bias",
    "encoder.layer.{i}.attention.attention.relative_position_bias",
    "encoder.relative_position_bias",
)
SEAM = Seam(
    "image",
    keeps=("embeddings", "pooler", *(b.replace("{i}", "*") for b in BIASES)),
    stem=("embeddings",),
    pools="all",
    pooler=("pooler",),
    biases=BIASES,
    states="raw",
)


def beit(c: Config) -> Tower:
    c.default("tie_word_embeddings", True)  # the head stays the model's own
    n, scaled = vit.norm(c), c.take("layer_scale_init_value") > 0
    m = Mlp(c.take("intermediate_size"), act(c), gated=False, bias=True)
    b = Block(vit.attention(c, "qvo"), m, n, "pre", layer_scale=scaled)
    final = None if c.take("use_mean_pooling") else n  # the pooler norms the mean
    return Tower(c.take("hidden_size"), vit.patches(c), (b,) * c.take("num_hidden_layers"), final)


FAMILIES: dict[str, Family] = {
    "beit": one(beit, JOINED, NESTED, seam=SEAM, classes="BEiT"),
    "data2vec-vision": one(beit, JOINED, NESTED, seam=SEAM, classes="Data2Vec vision"),
}
