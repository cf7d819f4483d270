"""Megatron's names of three eras in one spelling, that of Megatron-Core without the name of the stack.

language_model.transformer.layers.0.attention.query_key_value.weight       oldest
language_model.encoder.layers.0.self_attention.query_key_value.weight      until 2026
decoder.layers.0.self_attention.linear_qkv.weight                          Megatron-Core
layers.0.self_attention.linear_qkv.weight                                  here
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

SPELLINGS = (
    (r"^(module\.)*(language_model\.)?((transformer|encoder|decoder)\.)?", ""),
    (r"^(layers\.\d+\.)attention\.", r"\1self_attention."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
    # TransformerEngine fuses a norm with the matrix behind it
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."),
    (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
    (r"\.mlp\.experts\.local_experts\.", ".mlp.experts."),
    (r"^final_norm\.", "final_layernorm."),
    (r"^lm_head\.(layernorm|norm)\.", "lm_head.layer_norm."),
    (r"^lm_head\.bias$", "output_layer.bias"),
)
SPELLED = tuple((re.compile(pattern), new) for pattern, new in SPELLINGS)

NO_WEIGHT = re.compile(r"(^|[._/])(_extra_state\d*|inv_freq)$|_extra_state(/|$)|^word_embeddings_for_head\.")
"""State of kernels, tables that are computed, and the last stage's copy of the word embeddings."""

LAYER = re.compile(r"^layers\.(\d+)\.")
EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


def plain(name: str) -> str:
    """A stored name in the one spelling."""
    for pattern, new in SPELLED:
        name = pattern.sub(new, name)
    return name


def flat(tree: Mapping[object, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested dicts with their dotted names, without those that hold no weight."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif not NO_WEIGHT.search(name.removeprefix("module.")):
            yield name, value


def moved(name: str, pattern: re.Pattern[str], by: int) -> str:
    """The name with the number that `pattern` finds in it raised."""
    found = pattern.search(name)
    return name if not found or not by else name[: found.start(1)] + str(int(found[1]) + by) + name[found.end(1) :]
