"""StableLM: LLaMA with layer norms, rotary over a part of each head, and norms of queries and keys head by head."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.family import Family, one
from hasten.families.fields import rope
from hasten.families.llama import DECODER, SLOTS, attention, head, mlp, tokens
from hasten.spec import Block, Norm, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

NORMS = {"q_norm": "self_attn.q_layernorm.norms.{h}", "k_norm": "self_attn.k_layernorm.norms.{h}"}
STABLELM = Dialect("stablelm", "layers.{i}.", SLOTS | NORMS)


def stablelm(c: Config) -> Tower:
    eps = c.take("layer_norm_eps")
    n = Norm("layer", eps, bias=True)
    a = attention(c, bias="qkv" if c.default("use_qkv_bias", False) else "")
    a = replace(
        a,
        position=rope(c, a.head_dim, share=0.25),
        qk_norm=Norm("layer", eps) if c.default("qk_layernorm", False) else None,
        qk_norm_span="heads",
    )
    b = Block(a, mlp(c), n, "parallel-shared" if c.default("use_parallel_residual", False) else "pre")
    return Tower(c.take("hidden_size"), tokens(c), (b,) * c.take("num_hidden_layers"), n, head(c))


FAMILIES: dict[str, Family] = {"stablelm": one(stablelm, STABLELM, seam=DECODER, classes="StableLM 3B, 2 1.6B, 2 12B")}
