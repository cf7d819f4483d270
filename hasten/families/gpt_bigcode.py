"""GPTBigCode: GPT-2 whose heads share one key-value head, or each have their own side by side."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.families.gpt2 import GPT2
from hasten.spec import Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import GROUPED, Dialect, Packed

BIGCODE = Dialect("gpt_bigcode", "h.{i}.", {**GPT2.slots, "qkv": Packed("attn.c_attn", GROUPED)})


def gpt_bigcode(c: Config) -> Tower:
    c.refuse("add_cross_attention", False, why="GPTBigCode as the decoder of another encoder has no description")
    n, width, heads = Norm("layer", c.take("layer_norm_epsilon"), bias=True), c.take("n_embd"), c.take("n_head")
    d = width // heads
    scale = d**-0.5 if c.take("scale_attn_weights") else 1.0
    a = Attention(heads, 1 if c.take("multi_query") else heads, d, scale, causal=True, bias="qkvo")
    mlp = Mlp(c.default("n_inner", 4 * width), act(c, "activation_function"), gated=False, bias=True)
    embed = Tokens(c.take("vocab_size"), width, c.take("n_positions"))
    head = Head(tied=bool(c.default("tie_word_embeddings", True)))
    return Tower(width, embed, (Block(a, mlp, n, "pre"),) * c.take("n_layer"), n, head)


FAMILIES: dict[str, Family] = {
    "gpt_bigcode": one(gpt_bigcode, BIGCODE, seam=Seam("decoder"), classes="StarCoder, SantaCoder")
}
