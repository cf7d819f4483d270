"""MPNet: BERT's block whose scores take a learned bias by distance, too (arXiv 2004.09297)."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.bert import BERT, ENCODER, block, norm
from hasten.families.family import Family, one
from hasten.spec import Buckets, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

MPNET = Dialect(
    "mpnet",
    "encoder.layer.{i}.",
    {
        **{slot: BERT.slots[slot] for slot in ("tokens", "positions", "embed_norm", "up", "down", "mlp_norm")},
        "qkv": ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        "out": "attention.attn.o",
        "attn_norm": "attention.LayerNorm",
        "buckets": "encoder.relative_attention_bias",
    },
)
PADDING = 1  # fixed in the model's code, whatever the config's pad_token_id
BUCKETS = Buckets(count=32, max_distance=128, bidirectional=True)  # fixed there, too


def mpnet(c: Config) -> Tower:
    """Positions count the tokens that are not padding, from one behind the padding id."""
    c.default("tie_word_embeddings", True)  # the head stays the model's own
    c.refuse("relative_attention_num_buckets", BUCKETS.count, why="transformers' MPNet always counts in 32 buckets")
    b = block(c)
    e = Tokens(
        c.take("vocab_size"),
        c.take("hidden_size"),
        c.take("max_position_embeddings"),
        position_offset=PADDING + 1,
        counted="ids",
        padding=PADDING,
        norm=norm(c),
    )
    b = replace(b, attention=replace(b.attention, position=BUCKETS))
    return Tower(e.width, e, (b,) * c.take("num_hidden_layers"), None)


FAMILIES: dict[str, Family] = {"mpnet": one(mpnet, MPNET, seam=ENCODER, classes="MPNet, all-mpnet")}
