"""GPT-NeoX Japanese: GPT-NeoX one sublayer behind the other, without biases but for the last attention's output."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act, rope
from hasten.families.gpt_neox import DIALECTS
from hasten.spec import Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config


def gpt_neox_japanese(c: Config) -> Tower:
    c.default("is_decoder", True)  # it always is one
    n, width, heads = (
        Norm("layer", c.take("layer_norm_eps"), bias=True),
        c.take("hidden_size"),
        c.take("num_attention_heads"),
    )
    d = width // heads
    a = Attention(heads, heads, d, d**-0.5, causal=True, bias="", position=rope(c, d))
    mlp = Mlp(int(width * c.take("intermediate_multiple_size")), act(c), gated=False, bias=False)
    b, last = Block(a, mlp, n, "pre"), Block(replace(a, bias="o"), mlp, n, "pre")
    head = Head(tied=bool(c.default("tie_word_embeddings", True)))
    blocks = (*(b,) * (c.take("num_hidden_layers") - 1), last)
    return Tower(width, Tokens(c.take("vocab_size"), width), blocks, n, head)


FAMILIES: dict[str, Family] = {
    "gpt_neox_japanese": one(gpt_neox_japanese, *DIALECTS, seam=Seam("decoder"), classes="GPT-NeoX Japanese 2.7B")
}
