"""GPT-NeoX: fused query, key and value head by head, partial rotary, parallel residual."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act, rope
from hasten.spec import Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import GROUPED, Dialect, Packed

SLOTS = {
    "tokens": "embed_in",
    "final_norm": "final_layer_norm",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "qkv": Packed("attention.query_key_value", GROUPED),
    "out": "attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
DIALECTS = [Dialect(f"gpt_neox/{h}", "layers.{i}.", SLOTS | {"head": f"/{h}"}) for h in ("embed_out", "lm_head")]


def gpt_neox(c: Config) -> Tower:
    width, heads = c.take("hidden_size"), c.take("num_attention_heads")
    n = Norm("layer", c.take("layer_norm_eps"), bias=True)
    d = width // heads
    bias = "qkvo" if c.default("attention_bias", True) else ""
    a = Attention(heads, heads, d, d**-0.5, causal=True, bias=bias, position=rope(c, d, share=0.25))
    m = Mlp(c.take("intermediate_size"), act(c), gated=False, bias=True)
    b = Block(a, m, n, "parallel" if c.take("use_parallel_residual") else "pre")
    head = Head(tied=bool(c.default("tie_word_embeddings", False)))
    return Tower(width, Tokens(c.take("vocab_size"), width), (b,) * c.take("num_hidden_layers"), n, head)


FAMILIES: dict[str, Family] = {
    "gpt_neox": one(gpt_neox, *DIALECTS, seam=Seam("decoder"), classes="GPT-NeoX, Pythia, Dolly, RedPajama")
}
