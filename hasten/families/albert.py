"""ALBERT: one block's weights for every layer, behind a narrow embedding (arXiv 1909.11942)."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.bert import BERT, bert
from hasten.families.family import Family, Seam, one
from hasten.spec import Projection, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

EMBEDDINGS = ("tokens", "positions", "types", "embed_norm")
ALBERT = Dialect(
    "albert",
    "encoder.albert_layer_groups.0.albert_layers.0.",  # without {i}: every layer is this one
    {
        **{slot: BERT.slots[slot] for slot in EMBEDDINGS},
        "project_in": "encoder.embedding_hidden_mapping_in",
        "qkv": ("attention.query", "attention.key", "attention.value"),
        "out": "attention.dense",
        "attn_norm": "attention.LayerNorm",
        "up": "ffn",
        "down": "ffn_output",
        "mlp_norm": "full_layer_layer_norm",
    },
)
SEAM = Seam("encoder", keeps=("pooler",), pools="first", pooler=("pooler", "pooler_activation"))


def albert(c: Config) -> Tower:
    c.refuse("num_hidden_groups", 1, why="layers that share weights in several groups have no description")
    c.refuse("inner_group_num", 1, why="groups of several layers have no description")
    t = bert(c)
    assert isinstance(t.embed, Tokens)
    projection = Projection(bias=True, after="norm", back=False)
    return replace(t, embed=replace(t.embed, width=c.take("embedding_size"), projection=projection))


FAMILIES: dict[str, Family] = {"albert": one(albert, ALBERT, seam=SEAM, classes="ALBERT")}
