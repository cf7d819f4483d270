"""The description of an architecture: plain values that everything else is a function of."""

from hasten.spec.block import (
    Alibi,
    Attention,
    Block,
    Buckets,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    Mlp,
    Moe,
    Norm,
    Order,
    Rope,
    Scaling,
    Yarn,
)
from hasten.spec.tower import Frames, Head, Patches, Projection, Tokens, Tower

__all__ = [
    "Alibi",
    "Attention",
    "Block",
    "Buckets",
    "Dynamic",
    "Frames",
    "Head",
    "Linear",
    "Llama3",
    "LongRope",
    "Mlp",
    "Moe",
    "Norm",
    "Order",
    "Patches",
    "Projection",
    "Rope",
    "Scaling",
    "Tokens",
    "Tower",
    "Yarn",
]
