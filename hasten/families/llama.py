"""LLaMA and the many that are LLaMA but for a field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act, layer_types, rope
from hasten.spec import Attention, Block, Head, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect, Packed

DECODER = Seam("decoder")
SLOTS: dict[str, Any] = {
    "tokens": "embed_tokens",
    "final_norm": "norm",
    "head": "/lm_head",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
}
LLAMA = Dialect("llama", "layers.{i}.", SLOTS)
PHI3 = Dialect("phi3", "layers.{i}.", SLOTS | {"qkv": Packed("self_attn.qkv_proj"), "up": Packed("mlp.gate_up_proj")})
PLAIN_MLP = Dialect("llama, mlp without gate", "layers.{i}.", SLOTS | {"up": "mlp.up_proj"})


def head_dim(c: Config) -> int:
    return c.default("head_dim", None) or c.take("hidden_size") // c.take("num_attention_heads")


def attention(
    c: Config, kind: str = "full_attention", *, bias: str = "", qk_norm: bool = False, pairing: Any = "halves"
) -> Attention:
    """A layer's attention: grouped heads, rotary, a window in layers of the sliding kind."""
    d, heads = head_dim(c), c.take("num_attention_heads")
    return Attention(
        heads=heads,
        kv_heads=c.default("num_key_value_heads", heads),
        head_dim=d,
        scale=d**-0.5,
        causal=True,
        bias=bias,
        position=rope(c, d, pairing=pairing),
        window=c.default("sliding_window", None) if kind == "sliding_attention" else None,
        qk_norm=norm(c) if qk_norm else None,
    )


def norm(c: Config) -> Norm:
    return Norm("rms", c.take("rms_norm_eps"))


def bias(c: Config, letters: str = "qkvo", *, otherwise: bool = False) -> str:
    """The letters, where the config says that attention has biases."""
    return letters if c.default("attention_bias", otherwise) else ""


def mlp(c: Config) -> Mlp:
    return Mlp(c.take("intermediate_size"), act(c), gated=True, bias=bool(c.default("mlp_bias", False)))


def tokens(c: Config, scale: float = 1.0) -> Tokens:
    return Tokens(c.take("vocab_size"), c.take("hidden_size"), scale=scale)


def head(c: Config, scale: float = 1.0) -> Head:
    return Head(tied=bool(c.default("tie_word_embeddings", False)), scale=scale)


def stack(c: Config, block: Callable[[int, str], Block], otherwise: str = "full_attention") -> Tower:
    """A tower of `block(i, kind of layer i)`, its final norm of the blocks' kind."""
    kinds = layer_types(c, c.take("num_hidden_layers"), otherwise)
    blocks = tuple(block(i, k) for i, k in enumerate(kinds))
    return Tower(c.take("hidden_size"), tokens(c), blocks, blocks[0].norm, head(c))


def windowed(c: Config) -> str:
    """The kind of every layer of a config that has one window for all, or none."""
    return "sliding_attention" if c.default("sliding_window", None) else "full_attention"


def llama(c: Config) -> Tower:
    return stack(c, lambda i, kind: Block(attention(c, kind, bias=bias(c)), mlp(c), norm(c), "pre"))


def mistral(c: Config) -> Tower:
    return stack(c, lambda i, kind: Block(attention(c, kind), mlp(c), norm(c), "pre"), windowed(c))


def qwen2(c: Config) -> Tower:
    c.default("use_sliding_window", False, "max_window_layers")  # layer_types says it again
    return stack(c, lambda i, kind: Block(attention(c, kind, bias="qkv"), mlp(c), norm(c), "pre"))


def qwen3(c: Config) -> Tower:
    c.default("use_sliding_window", False, "max_window_layers")  # layer_types says it again
    return stack(c, lambda i, kind: Block(attention(c, kind, bias=bias(c), qk_norm=True), mlp(c), norm(c), "pre"))


def smollm3(c: Config) -> Tower:
    """Every fourth layer, or those that the config lists with a zero, goes without positions."""
    turning = c.take("no_rope_layers")  # 1 where a layer does rotate, whatever the name says
    c.default("use_sliding_window", False)  # layer_types says it again

    def block(i: int, kind: str) -> Block:
        a = attention(c, kind, bias=bias(c))
        return Block(a if turning[i] else replace(a, position=None), mlp(c), norm(c), "pre")

    return stack(c, block)


def seed_oss(c: Config) -> Tower:
    letters = bias(c, "qkv") + ("o" if c.default("attention_out_bias", False) else "")
    return stack(c, lambda i, kind: Block(attention(c, kind, bias=letters), mlp(c), norm(c), "pre"))


def arcee(c: Config) -> Tower:
    plain = replace(mlp(c), gated=False)
    return stack(c, lambda i, kind: Block(attention(c, kind, bias=bias(c)), plain, norm(c), "pre"))


def helium(c: Config) -> Tower:
    n = replace(norm(c), wide=True)
    a = attention(c, bias=bias(c, "qkv"), pairing="neighbours")
    return stack(c, lambda i, kind: Block(a, mlp(c), n, "pre"))


def ernie(c: Config) -> Tower:
    biased = bool(c.default("use_bias", False))
    a = attention(c, bias="qkvo" if biased else "", pairing="neighbours")
    return stack(c, lambda i, kind: Block(a, replace(mlp(c), bias=biased), norm(c), "pre"))


FAMILIES: dict[str, Family] = {
    "llama": one(llama, LLAMA, seam=DECODER, classes="Llama 1 to 3, TinyLlama, Vicuna, SmolLM"),
    "mistral": one(mistral, LLAMA, seam=DECODER, classes="Mistral 7B, Nemo"),
    "ministral": one(mistral, LLAMA, seam=DECODER, classes="Ministral 8B"),
    "qwen2": one(qwen2, LLAMA, seam=DECODER, classes="Qwen 2, Qwen 2.5"),
    "qwen3": one(qwen3, LLAMA, seam=DECODER, classes="Qwen 3"),
    "phi3": one(mistral, PHI3, seam=DECODER, classes="Phi-3, Phi-3.5, Phi-4"),
    "smollm3": one(smollm3, LLAMA, seam=DECODER, classes="SmolLM3"),
    "seed_oss": one(seed_oss, LLAMA, seam=DECODER, classes="Seed-OSS"),
    "arcee": one(arcee, PLAIN_MLP, seam=DECODER, classes="AFM"),
    "helium": one(helium, LLAMA, seam=DECODER, classes="Helium"),
    "ernie4_5": one(ernie, LLAMA, seam=DECODER, classes="ERNIE 4.5"),
}
