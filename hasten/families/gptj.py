"""GPT-J, and CodeGen, which is GPT-J with query, value and key in blocks of one matrix."""

from __future__ import annotations

from typing import Any

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.spec import Attention, Block, Head, Mlp, Norm, Rope, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import BLOCKED, Dialect, Packed

SLOTS: dict[str, Any] = {
    "tokens": "wte",
    "final_norm": "ln_f",
    "head": "/lm_head",
    "attn_norm": "ln_1",
    "qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "out": "attn.out_proj",
    "up": "mlp.fc_in",
    "down": "mlp.fc_out",
}
GPTJ = Dialect("gptj", "h.{i}.", SLOTS)
CODEGEN = Dialect("codegen", "h.{i}.", SLOTS | {"qkv": Packed("attn.qkv_proj", BLOCKED)})


def gptj(c: Config) -> Tower:
    n, width, heads = Norm("layer", c.take("layer_norm_epsilon"), bias=True), c.take("n_embd"), c.take("n_head")
    d = width // heads
    turn = Rope(c.take("rotary_dim"), 10000.0, "neighbours")
    a = Attention(heads, heads, d, d**-0.5, causal=True, bias="", position=turn)
    mlp = Mlp(c.default("n_inner", 4 * width), act(c, "activation_function"), gated=False, bias=True)
    b = Block(a, mlp, n, "parallel-shared")
    head = Head(tied=bool(c.default("tie_word_embeddings", False)), bias=True)
    return Tower(width, Tokens(c.take("vocab_size"), width), (b,) * c.take("n_layer"), n, head)


FAMILIES: dict[str, Family] = {
    "gptj": one(gptj, GPTJ, seam=Seam("decoder"), classes="GPT-J, GPT4All-J"),
    "codegen": one(gptj, CODEGEN, seam=Seam("decoder"), classes="CodeGen, CodeGen 2"),
}
