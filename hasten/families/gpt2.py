"""GPT-2: learned positions, fused query, key and value, matrices stored (in, out)."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.spec import Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect, Packed

GPT2 = Dialect(
    "gpt2",
    "h.{i}.",
    {
        "tokens": "wte",
        "positions": "wpe",
        "final_norm": "ln_f",
        "head": "/lm_head",
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "qkv": Packed("attn.c_attn"),
        "out": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    transposed=frozenset({"qkv", "out", "up", "down"}),
)


def gpt2(c: Config) -> Tower:
    c.refuse("add_cross_attention", False, why="GPT-2 as the decoder of another encoder has no description")
    c.default("reorder_and_upcast_attn", False)  # the same numbers: scores are float32 here always
    n, width, heads = Norm("layer", c.take("layer_norm_epsilon"), bias=True), c.take("n_embd"), c.take("n_head")
    d = width // heads
    scale = d**-0.5 if c.take("scale_attn_weights") else 1.0
    by_layer = c.take("scale_attn_by_inverse_layer_idx")
    mlp = Mlp(c.default("n_inner", 4 * width), act(c, "activation_function"), gated=False, bias=True)

    def block(i: int) -> Block:
        a = Attention(heads, heads, d, scale / (i + 1) if by_layer else scale, causal=True, bias="qkvo")
        return Block(a, mlp, n, "pre")

    embed = Tokens(c.take("vocab_size"), width, c.take("n_positions"))
    head = Head(tied=bool(c.default("tie_word_embeddings", True)))
    return Tower(width, embed, tuple(map(block, range(c.take("n_layer")))), n, head)


FAMILIES: dict[str, Family] = {
    "gpt2": one(gpt2, GPT2, seam=Seam("decoder"), classes="GPT-2, DistilGPT-2, Cerebras-GPT"),
}
