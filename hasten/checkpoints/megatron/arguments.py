"""The arguments of the training run, stored in the files, compared with the description of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hasten.spec import Mlp, Rope, Tokens, Tower

NORMS = {"LayerNorm": "layer", "RMSNorm": "rms"}


def contradictions(arguments: Mapping[str, Any], t: Tower) -> list[str]:
    """Each argument that says another thing than the model; names and shapes alone would not show most of them."""
    return [
        f"the checkpoint was trained with {said}, the model has {has}"
        for said, has in _differences({k: v for k, v in arguments.items() if v is not None}, t)
    ]


def _differences(a: Mapping[str, Any], t: Tower) -> Iterator[tuple[str, str]]:
    block = t.blocks[0]
    n = block.attention
    mlp = block.mlp if isinstance(block.mlp, Mlp) else block.mlp.expert
    groups = a.get("num_query_groups") if a.get("group_query_attention") else a.get("num_attention_heads")
    facts = (
        ("num_layers", a.get("num_layers"), len(t.blocks)),
        ("hidden_size", a.get("hidden_size"), t.width),
        ("num_attention_heads", a.get("num_attention_heads"), n.heads),
        ("num_query_groups", groups, n.kv_heads),
        ("kv_channels", a.get("kv_channels"), n.head_dim),
        ("ffn_hidden_size", a.get("ffn_hidden_size"), mlp.width if mlp is block.mlp else None),
        ("normalization", NORMS.get(a.get("normalization", "")), block.norm.kind),
        ("apply_layernorm_1p", a.get("apply_layernorm_1p"), block.norm.offset == 1),
        ("layernorm_zero_centered_gamma", a.get("layernorm_zero_centered_gamma"), block.norm.offset == 1),
        ("apply_residual_connection_post_layernorm", a.get("apply_residual_connection_post_layernorm"), False),
        ("swiglu", a.get("swiglu"), mlp.gated and mlp.act == "silu"),
        ("the activation", _activation(a), mlp.act),
        ("norm_epsilon", a.get("norm_epsilon", a.get("layernorm_epsilon")), block.norm.eps),
        *_positions(a, t),
    )
    for name, said, has in facts:
        if said is not None and has is not None and said != has:
            yield f"{name} {said}", str(has)


def _activation(a: Mapping[str, Any]) -> str | None:
    """The function in the mlp; None where the arguments are too old to tell."""
    if a.get("swiglu"):
        return "silu"
    if a.get("squared_relu"):
        return "relu2"
    if a.get("openai_gelu") or a.get("bias_gelu_fusion"):
        return "gelu_tanh"  # the fused kernel computes the tanh approximation
    return "gelu" if "bias_gelu_fusion" in a else None


def _positions(a: Mapping[str, Any], t: Tower) -> Iterator[tuple[str, Any, Any]]:
    position = t.blocks[0].attention.position
    learned = isinstance(t.embed, Tokens) and t.embed.positions is not None
    has = "rope" if isinstance(position, Rope) else "learned_absolute" if learned else None
    yield "position_embedding_type", a.get("position_embedding_type"), has
    if isinstance(position, Rope) and a.get("position_embedding_type") == "rope":
        yield "rotary_base", a.get("rotary_base"), position.theta
        share = a.get("rotary_percent")
        yield "rotary dimensions", int(t.blocks[0].attention.head_dim * share) if share else None, position.dim
        pairs = a.get("rotary_interleaved")
        yield "rotary_interleaved", pairs, position.pairing == "neighbours"
