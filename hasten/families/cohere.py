"""Cohere's Command models: one norm before both sublayers, neighbours that rotate, a scaled head."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.family import Family, one
from hasten.families.llama import DECODER, LLAMA, attention, bias, head, mlp, stack
from hasten.spec import Attention, Block, Norm, Tower
from hasten.spec.config import Config


def norm(c: Config) -> Norm:
    return Norm("layer", c.take("layer_norm_eps"))


def cohere(c: Config) -> Tower:
    a = _attention(c, "full_attention")
    if c.default("use_qk_norm", False):
        a = replace(a, qk_norm=norm(c), qk_norm_span="heads")
    return _scaled(c, stack(c, lambda i, kind: Block(a, mlp(c), norm(c), "parallel-shared")))


def cohere2(c: Config) -> Tower:
    """Layers without a window have no positions either."""

    def block(i: int, kind: str) -> Block:
        a = _attention(c, kind)
        return Block(a if a.window else replace(a, position=None), mlp(c), norm(c), "parallel-shared")

    return _scaled(c, stack(c, block))


def _attention(c: Config, kind: str) -> Attention:
    return attention(c, kind, bias=bias(c), pairing="neighbours")


def _scaled(c: Config, t: Tower) -> Tower:
    return replace(t, head=head(c, c.take("logit_scale")))


FAMILIES: dict[str, Family] = {
    "cohere": one(cohere, LLAMA, seam=DECODER, classes="Command-R, Aya 23"),
    "cohere2": one(cohere2, LLAMA, seam=DECODER, classes="Command-R7B, Command-A"),
}
