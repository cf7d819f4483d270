"""Small towers and tensors to test weights with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hasten.spec import Attention, Block, Head, Mlp, Moe, Norm, Rope, Tokens, Tower
from hasten.weights import Dialect, Packed, params

ATTENTION = Attention(4, 2, 3, 1.0, causal=True, bias="", position=Rope(2, 1e4, "halves"))
MLP = Mlp(7, "silu", gated=True, bias=False)
PLAIN = Block(ATTENTION, MLP, Norm("rms", 1e-6), "pre")
SLOTS = {
    "tokens": "embed",
    "final_norm": "norm",
    "head": "/head",
    "attn_norm": "n1",
    "mlp_norm": "n2",
    "qkv": ("a.q", "a.k", "a.v"),
    "out": "a.o",
    "up": ("m.gate", "m.up"),
    "down": "m.down",
}
APART = Dialect("apart", "blocks.{i}.", SLOTS)
FUSED = Dialect("fused", "blocks.{i}.", SLOTS | {"qkv": Packed("a.qkv"), "up": Packed("m.gate_up")})


def tower(*blocks: Block) -> Tower:
    return Tower(10, Tokens(11, 10), blocks or (PLAIN, PLAIN), Norm("rms", 1e-6), Head(tied=False))


def biased(letters: str) -> Block:
    return replace(PLAIN, attention=replace(ATTENTION, bias=letters))


def routed(experts: int = 3) -> Block:
    return replace(PLAIN, mlp=Moe(experts, 2, replace(MLP, width=5, bias=True), renormalize=True, router_bias=True))


def canonical(t: Tower) -> dict[str, Tensor]:
    """Random weights of a tower, by canonical name; parts that have no source are zero."""
    made = {}
    for p in params(t):
        w = torch.randn(p.shape)
        if any(p.absent):
            for part, gone in zip(w.split(list(p.parts)), p.absent, strict=True):
                part.mul_(not gone)
        made[p.name] = w
    return made
