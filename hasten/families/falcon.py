"""Falcon, in three shapes: 7B (one key-value head, one norm), 40B (grouped heads, two norms), RW (alibi, sequential).

The alibi of RW follows transformers' "sdpa" path: its "eager" one adds the same bias twice.
"""

from __future__ import annotations

from typing import Any

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act, rope
from hasten.spec import Alibi, Attention, Block, Head, Mlp, Norm, Order, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import GROUPED, Dialect, Packed

SLOTS: dict[str, Any] = {
    "tokens": "word_embeddings",
    "final_norm": "ln_f",
    "head": "/lm_head",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "qkv": Packed("self_attention.query_key_value", GROUPED),
    "out": "self_attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
FALCON = Dialect("falcon", "h.{i}.", SLOTS)
TWO_NORMS = Dialect("falcon/two norms", "h.{i}.", SLOTS | {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"})


def _order(c: Config, grouped: bool) -> Order:
    if grouped:
        c.refuse("parallel_attn", True, why="new_decoder_architecture is parallel in transformers too")
        return "parallel" if c.default("num_ln_in_parallel_attn", 2) == 2 else "parallel-shared"
    return "parallel-shared" if c.take("parallel_attn") else "pre"


def falcon(c: Config) -> Tower:
    n, width = Norm("layer", c.take("layer_norm_epsilon"), bias=True), c.take("hidden_size")
    heads, bias, grouped = c.take("num_attention_heads"), bool(c.take("bias")), bool(c.take("new_decoder_architecture"))
    one_kv = c.take("multi_query")
    kv_heads = c.take("num_kv_heads") if grouped else 1 if one_kv else heads
    d = width // heads
    turn = rope(c, d)
    a = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=d,
        scale=d**-0.5,
        causal=True,
        bias="qkvo" if bias else "",
        position=Alibi(scaled=True, bf16=True) if c.take("alibi") else turn,
    )
    mlp = Mlp(c.default("ffn_hidden_size", 4 * width), act(c, "activation"), gated=False, bias=bias)
    b = Block(a, mlp, n, _order(c, grouped))
    head = Head(tied=bool(c.default("tie_word_embeddings", True)))
    return Tower(width, Tokens(c.take("vocab_size"), width), (b,) * c.take("num_hidden_layers"), n, head)


FAMILIES: dict[str, Family] = {
    "falcon": one(falcon, FALCON, TWO_NORMS, seam=Seam("decoder"), classes="Falcon 7B, 40B, 180B, RW, Falcon 2")
}
