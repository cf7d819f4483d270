"""Nemotron: LLaMA with LayerNorms that store their distance from one, and a squared ReLU without gate."""

from __future__ import annotations

from dataclasses import replace

from hasten.families.family import Family, one
from hasten.families.llama import DECODER, PLAIN_MLP, attention, bias, mlp, stack
from hasten.spec import Block, Norm, Tower
from hasten.spec.config import Config


def nemotron(c: Config) -> Tower:
    n = Norm("layer", c.take("norm_eps"), bias=True, offset=1.0)
    m = replace(mlp(c), gated=False)
    return stack(c, lambda i, kind: Block(attention(c, bias=bias(c)), m, n, "pre"))


FAMILIES: dict[str, Family] = {
    "nemotron": one(nemotron, PLAIN_MLP, seam=DECODER, classes="Nemotron-4, Minitron"),
}
