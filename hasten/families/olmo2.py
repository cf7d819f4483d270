"""Blocks that normalise what a sublayer gives and not what it reads: OLMo 2 and 3, FlexOlmo, EXAONE 4."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.family import Family, one
from hasten.families.fields import rope
from hasten.families.llama import DECODER, SLOTS, attention, bias, head_dim, mlp, norm, stack
from hasten.families.moe import SINGLE, STACKED, experts
from hasten.spec import Attention, Block, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

NORMS = {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
OLMO2 = Dialect("olmo2", "layers.{i}.", SLOTS | NORMS)
FLEX = [Dialect(f"flex_olmo, {d.name}", d.block, {**d.slots, **NORMS}) for d in (STACKED, SINGLE)]


def olmo2(c: Config) -> Tower:
    return stack(c, lambda i, kind: _block(c, _attention(c, kind)))


def flex_olmo(c: Config) -> Tower:
    m = experts(c, "intermediate_size")
    return stack(c, lambda i, kind: replace(_block(c, _attention(c, kind)), mlp=m))


def olmo3(c: Config) -> Tower:
    """OLMo 2 with windows, and a rotary embedding for each kind of layer."""

    def block(i: int, kind: str) -> Block:
        return _block(c, replace(_attention(c, kind), position=rope(c, head_dim(c), kind=kind)))

    return stack(c, block)


def exaone4(c: Config) -> Tower:
    """Layers without a window have no positions, unless no layer has a window."""
    windows = c.default("sliding_window", None)

    def block(i: int, kind: str) -> Block:
        a = attention(c, kind, qk_norm=True)
        turns = windows is None or kind == "sliding_attention"
        return Block(a if turns else replace(a, position=None), mlp(c), norm(c), "reordered")

    return stack(c, block)


def _attention(c: Config, kind: str) -> Attention:
    n = replace(norm(c), wide=True)
    return replace(attention(c, kind, bias=bias(c)), qk_norm=n, qk_norm_span="width")


def _block(c: Config, a: Attention) -> Block:
    return Block(a, mlp(c), replace(norm(c), wide=True), "reordered")


FAMILIES: dict[str, Family] = {
    "olmo2": one(olmo2, OLMO2, seam=DECODER, classes="OLMo 2"),
    "olmo3": one(olmo3, OLMO2, seam=DECODER, classes="OLMo 3"),
    "flex_olmo": one(flex_olmo, *FLEX, seam=DECODER, classes="FlexOlmo"),
    "exaone4": one(exaone4, OLMO2, seam=DECODER, classes="EXAONE 4.0"),
}
