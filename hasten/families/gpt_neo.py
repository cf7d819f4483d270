"""GPT-Neo: GPT-2 with unscaled scores, and layers that see a window only."""

from __future__ import annotations

from hasten.errors import ConfigError
from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.spec import Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

GPT_NEO = Dialect(
    "gpt_neo",
    "h.{i}.",
    {
        "tokens": "wte",
        "positions": "wpe",
        "final_norm": "ln_f",
        "head": "/lm_head",
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "qkv": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        "out": "attn.attention.out_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
)


def gpt_neo(c: Config) -> Tower:
    n, width, heads = Norm("layer", c.take("layer_norm_epsilon"), bias=True), c.take("hidden_size"), c.take("num_heads")
    windows = {"global": None, "local": c.take("window_size")}
    mlp = Mlp(c.default("intermediate_size", 4 * width), act(c, "activation_function"), gated=False, bias=True)

    def block(kind: str) -> Block:
        if kind not in windows:
            raise ConfigError(f"{c.origin}: attention_layers may hold global and local, got {kind!r}")
        a = Attention(heads, heads, width // heads, 1.0, causal=True, bias="o", window=windows[kind])
        return Block(a, mlp, n, "pre")

    embed = Tokens(c.take("vocab_size"), width, c.take("max_position_embeddings"))
    head = Head(tied=bool(c.default("tie_word_embeddings", True)))
    return Tower(width, embed, tuple(map(block, c.take("attention_layers"))), n, head)


FAMILIES: dict[str, Family] = {
    "gpt_neo": one(gpt_neo, GPT_NEO, seam=Seam("decoder", windows="beside masks"), classes="GPT-Neo, TinyStories")
}
