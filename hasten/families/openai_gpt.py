"""The first GPT: GPT-2 with norms behind the sublayers and none at the end, and without a key-value cache."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.families.gpt2 import GPT2
from hasten.spec import Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

OPENAI = Dialect(
    "openai-gpt",
    "h.{i}.",
    {**GPT2.slots, "tokens": "tokens_embed", "positions": "positions_embed"},
    GPT2.transposed,
)
ACT = {"gelu": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}


def openai_gpt(c: Config) -> Tower:
    n, width, heads = Norm("layer", c.take("layer_norm_epsilon"), bias=True), c.take("n_embd"), c.take("n_head")
    d = width // heads
    a = Attention(heads, heads, d, d**-0.5, causal=True, bias="qkvo")
    b = Block(a, Mlp(4 * width, c.choose("afn", ACT), gated=False, bias=True), n, "post")
    embed = Tokens(c.take("vocab_size"), width, c.take("n_positions"))
    head = Head(tied=bool(c.default("tie_word_embeddings", True)))
    return Tower(width, embed, (b,) * c.take("n_layer"), None, head)


FAMILIES: dict[str, Family] = {"openai-gpt": one(openai_gpt, OPENAI, seam=Seam("decoder"), classes="GPT")}
