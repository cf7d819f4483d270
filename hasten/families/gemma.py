"""Gemma 1 to 3: scaled tokens, norms that store their distance from one, and from Gemma 2 on norms around sublayers."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act, rope
from hasten.families.llama import DECODER, LLAMA, SLOTS, attention, bias, head, head_dim, stack, tokens
from hasten.spec import Attention, Block, Mlp, Norm, Order, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

GEMMA2 = Dialect(
    "gemma2",
    "layers.{i}.",
    SLOTS
    | {
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
)
GEMMA3 = Seam("decoder", path=("model", ""))  # the base model of transformers 4 is the whole model


def norm(c: Config) -> Norm:
    return Norm("rms", c.take("rms_norm_eps"), offset=1.0, wide=True)


def mlp(c: Config, name: str) -> Mlp:
    return Mlp(c.take("intermediate_size"), act(c, name), gated=True, bias=False)


def scaled(c: Config, t: Tower) -> Tower:
    """The tower with tokens times the square root of the width, and the head capped where the config says so."""
    c.refuse("use_bidirectional_attention", False, why="Gemma as an encoder has no description")
    h = replace(head(c), softcap=c.default("final_logit_softcapping", None))
    embed = replace(tokens(c, c.take("hidden_size") ** 0.5), scale_rounded=True)
    return replace(t, embed=embed, head=h)


def gemma(c: Config) -> Tower:
    c.default("hidden_activation", None)  # transformers heeds hidden_act alone
    a = attention(c, bias=bias(c))
    return scaled(c, stack(c, lambda i, kind: Block(a, mlp(c, "hidden_act"), norm(c), "pre")))


def gemma2(c: Config, order: Order = "sandwich") -> Tower:
    cap = c.default("attn_logit_softcapping", None)

    def block(i: int, kind: str) -> Block:
        return Block(replace(_attention(c, kind), softcap=cap), mlp(c, "hidden_activation"), norm(c), order)

    return scaled(c, stack(c, block))


def vaultgemma(c: Config) -> Tower:
    return gemma2(c, "pre")


def gemma3(c: Config) -> Tower:
    c.default("attn_logit_softcapping", None)  # transformers leaves it out of Gemma 3's scores

    def block(i: int, kind: str) -> Block:
        a = replace(_attention(c, kind), qk_norm=norm(c), position=rope(c, head_dim(c), kind=kind))
        return Block(a, mlp(c, "hidden_activation"), norm(c), "sandwich")

    return scaled(c, stack(c, block))


def _attention(c: Config, kind: str) -> Attention:
    return replace(attention(c, kind, bias=bias(c)), scale=c.take("query_pre_attn_scalar") ** -0.5)


FAMILIES: dict[str, Family] = {
    "gemma": one(gemma, LLAMA, seam=DECODER, classes="Gemma 1, CodeGemma"),
    "gemma2": one(gemma2, GEMMA2, seam=DECODER, classes="Gemma 2"),
    "vaultgemma": one(vaultgemma, GEMMA2, seam=DECODER, classes="VaultGemma"),
    "gemma3_text": one(gemma3, GEMMA2, seam=GEMMA3, classes="Gemma 3 (text)"),
}
