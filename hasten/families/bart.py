"""BART and its kin: MBART, Marian, Pegasus, M2M-100 and NLLB, Blenderbot, PLBART."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hasten.families.family import Family, Seam
from hasten.families.fields import act
from hasten.spec import Attention, Block, Mlp, Norm, Order, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

DIALECT = Dialect(
    "bart",
    "layers.{i}.",
    {
        "tokens": "embed_tokens",
        "positions": "embed_positions",
        "embed_norm": "layernorm_embedding",
        "final_norm": "layer_norm",
        "attn_norm": "self_attn_layer_norm",
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": "self_attn.out_proj",
        "cross_norm": "encoder_attn_layer_norm",
        "cross_q": "encoder_attn.q_proj",
        "cross_kv": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
        "cross_out": "encoder_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "up": "fc1",
        "down": "fc2",
    },
)
SINUSOIDS = Dialect("m2m_100", DIALECT.block, {**DIALECT.slots, "positions": "embed_positions.weights"})
SEAMS = {"encoder": Seam("seq2seq-encoder", ("encoder",)), "decoder": Seam("seq2seq-decoder", ("decoder",))}


@dataclass(frozen=True, slots=True)
class Kin:
    """What differs among BART's relatives: no two agree on all of it."""

    order: Order
    embed_norm: bool
    final_norm: bool
    spare: int  # rows of the position table before position 0
    counted: Literal["all", "ids"] = "all"


def describe(kin: Kin) -> Callable[[Config], Mapping[str, Tower]]:
    def towers(c: Config) -> Mapping[str, Tower]:
        for name in ("tie_word_embeddings", "is_decoder", "add_cross_attention", "normalize_before"):
            c.default(name, None)  # the head stays the model's own; the rest is said by the two sides
        return {side: _tower(c, kin, side) for side in ("encoder", "decoder")}

    return towers


def _tower(c: Config, kin: Kin, side: str) -> Tower:
    n, width, heads = Norm("layer", 1e-5, bias=True), c.take("d_model"), c.take(f"{side}_attention_heads")
    d = width // heads

    def attention(causal: bool) -> Attention:
        return Attention(heads, heads, d, d**-0.5, causal=causal, bias="qkvo")

    mlp = Mlp(c.take(f"{side}_ffn_dim"), act(c, "activation_function"), gated=False, bias=True)
    cross = attention(False) if side == "decoder" else None
    block = Block(attention(side == "decoder"), mlp, n, kin.order, cross=cross)
    padding = c.take("pad_token_id") if kin.counted == "ids" else None
    embed = Tokens(
        c.take("vocab_size"),
        width,
        positions=c.take("max_position_embeddings") + kin.spare,
        position_offset=kin.spare if padding is None else padding + 1,
        counted=kin.counted,
        padding=padding,
        norm=n if kin.embed_norm else None,
        scale=width**0.5 if c.default("scale_embedding", False) else 1.0,
    )
    return Tower(width, embed, (block,) * c.take(f"{side}_layers"), n if kin.final_norm else None)


def _family(kin: Kin, classes: str, dialect: Dialect = DIALECT) -> Family:
    return Family(describe(kin), {"encoder": (dialect,), "decoder": (dialect,)}, SEAMS, classes)


FAMILIES: dict[str, Family] = {
    "bart": _family(Kin("post", embed_norm=True, final_norm=False, spare=2), "BART"),
    "mbart": _family(Kin("pre", embed_norm=True, final_norm=True, spare=2), "mBART, mBART-50"),
    "plbart": _family(Kin("post", embed_norm=True, final_norm=False, spare=2), "PLBART"),
    "marian": _family(Kin("post", embed_norm=False, final_norm=False, spare=0), "OPUS-MT"),
    "pegasus": _family(Kin("pre", embed_norm=False, final_norm=True, spare=0), "Pegasus"),
    "blenderbot": _family(Kin("pre", embed_norm=False, final_norm=True, spare=0), "Blenderbot"),
    "m2m_100": _family(
        Kin("pre", embed_norm=False, final_norm=True, spare=2, counted="ids"), "M2M-100, NLLB", SINUSOIDS
    ),
}
