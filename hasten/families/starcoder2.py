"""StarCoder 2: grouped heads and rotary positions as in LLaMA, layer norms and a plain mlp as in GPT-2."""

from __future__ import annotations

from hasten.families.family import Family, one
from hasten.families.fields import act
from hasten.families.llama import DECODER, SLOTS, attention, tokens
from hasten.spec import Block, Head, Mlp, Norm, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

STARCODER2 = Dialect("starcoder2", "layers.{i}.", SLOTS | {"up": "mlp.c_fc", "down": "mlp.c_proj"})


def starcoder2(c: Config) -> Tower:
    n, bias = Norm("layer", c.take("norm_epsilon"), bias=True), bool(c.take("use_bias"))
    a = attention(c, "sliding_attention", bias="qkvo" if bias else "")
    b = Block(a, Mlp(c.take("intermediate_size"), act(c), gated=False, bias=bias), n, "pre")
    head = Head(tied=bool(c.default("tie_word_embeddings", True)))
    return Tower(c.take("hidden_size"), tokens(c), (b,) * c.take("num_hidden_layers"), n, head)


FAMILIES: dict[str, Family] = {"starcoder2": one(starcoder2, STARCODER2, seam=DECODER, classes="StarCoder 2")}
