"""XGLM and BioGPT: OPT's block behind an embedding scaled by the root of its width."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.families.opt import OPT, SKIPPED
from hasten.spec import Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

SLOTS = {**OPT.slots, "final_norm": "layer_norm"}
BIOGPT = Dialect("biogpt", OPT.block, SLOTS | {"head": "/output_projection"})
XGLM = Dialect("xglm", OPT.block, SLOTS | {"positions": "embed_positions.weights"})  # sines, computed, in a buffer


def tower(c: Config, width: int, layers: int, heads: int, mlp: Mlp, tokens: Tokens) -> Tower:
    c.default("is_decoder", True)  # it always is one
    n, d = Norm("layer", 1e-5, bias=True), width // heads
    a = Attention(heads, heads, d, d**-0.5, causal=True, bias="qkvo")
    head = Head(tied=bool(c.default("tie_word_embeddings", True)))
    return Tower(width, tokens, (Block(a, mlp, n, "pre"),) * layers, n, head)


def scale(c: Config, width: int) -> float:
    return width**0.5 if c.take("scale_embedding") else 1.0


def xglm(c: Config) -> Tower:
    c.refuse("add_cross_attention", False, why="XGLM as the decoder of another encoder has no description")
    width = c.take("d_model")
    mlp = Mlp(c.take("ffn_dim"), act(c, "activation_function"), gated=False, bias=True)
    rows = c.take("max_position_embeddings") + SKIPPED
    e = Tokens(c.take("vocab_size"), width, rows, position_offset=SKIPPED, scale=scale(c, width))
    return tower(c, width, c.take("num_layers"), c.take("attention_heads"), mlp, e)


def biogpt(c: Config) -> Tower:
    """transformers 4 counts positions by the mask where it is given none, 5 counts all tokens."""
    old = str(c.default("transformers_version", "5")).startswith("4.")
    width = c.take("hidden_size")
    mlp = Mlp(c.take("intermediate_size"), act(c), gated=False, bias=True)
    e = Tokens(
        vocab=c.take("vocab_size"),
        width=width,
        positions=c.take("max_position_embeddings") + SKIPPED,
        position_offset=SKIPPED,
        counted="mask" if old else "all",
        scale=scale(c, width),
    )
    return tower(c, width, c.take("num_hidden_layers"), c.take("num_attention_heads"), mlp, e)


FAMILIES: dict[str, Family] = {
    "xglm": one(xglm, XGLM, seam=Seam("decoder"), classes="XGLM, InCoder"),
    "biogpt": one(biogpt, BIOGPT, seam=Seam("decoder", states="either"), classes="BioGPT"),
}
