"""A reader over a model's config that remembers what was read and refuses what nobody reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hasten.errors import ConfigError

MATTERS = frozenset(
    [
        "alibi",
        "attention_bias",
        "attn_logit_softcapping",
        "attention_multiplier",
        "clip_qkv",
        "embedding_multiplier",
        "final_logit_softcapping",
        "hidden_act",
        "hidden_activation",
        "activation_function",
        "is_decoder",
        "add_cross_attention",
        "layer_types",
        "logits_scaling",
        "logit_scale",
        "mlp_bias",
        "mlp_only_layers",
        "moe_layer_freq",
        "first_k_dense_replace",
        "no_rope_layers",
        "num_experts",
        "num_local_experts",
        "partial_rotary_factor",
        "position_embedding_type",
        "parallel_attn",
        "qk_norm",
        "use_qk_norm",
        "qk_layernorm",
        "residual_multiplier",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "rotary_dim",
        "scale_embedding",
        "scale_attn_by_inverse_layer_idx",
        "scale_attn_weights",
        "reorder_and_upcast_attn",
        "shared_expert_intermediate_size",
        "sliding_window",
        "use_parallel_residual",
        "use_qkv_bias",
        "use_sliding_window",
        "attention_out_bias",
        "decoder_sparse_step",
        "norm_topk_prob",
        "qkv_bias",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "swiglu_alpha",
        "swiglu_limit",
        "tie_word_embeddings",
        "use_bias",
        "use_bidirectional_attention",
        "v_head_dim",
        "kv_lora_rank",
        "q_lora_rank",
        "n_shared_experts",
        "num_nextn_predict_layers",
        "apply_residual_connection_post_layernorm",
        "do_layer_norm_before",
        "enable_bias",
        "multi_query",
        "new_decoder_architecture",
        "num_hidden_groups",
        "inner_group_num",
        "embedding_size",
        "layer_scale_init_value",
        "use_swiglu_ffn",
        "use_task_id",
    ]
)
"""Fields that change what a model computes. One of them present, switched on and never read is refused."""

OFF: tuple[Any, ...] = (None, False, 0, 0.0, 1.0, "", "absolute", [], {}, ())


class Config:
    """`values` of one config, found at `origin` (a class name or a path, for messages)."""

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self.values, self.origin = values, origin
        self.read: set[str] = set()

    def take(self, *names: str) -> Any:
        """The first of `names` that is present and not None; ConfigError if there is none."""
        value = self.default(names[0], None, *names[1:])
        if value is None:
            raise ConfigError(f"{self.origin} has no {' or '.join(names)}")
        return value

    def default(self, name: str, default: Any, *others: str) -> Any:
        """The first of the names that is present and not None, else `default`."""
        self.read.update((name, *others))
        present = (self.values[n] for n in (name, *others) if self.values.get(n) is not None)
        return next(present, default)

    def choose(self, name: str, table: Mapping[str, Any], default: str | None = None) -> Any:
        """table[value of the field]; ConfigError that lists the table for any other value."""
        value = self.take(name) if default is None else self.default(name, default)
        if value not in table:
            raise ConfigError(f"{self.origin}: {name}={value!r} is not one of {', '.join(sorted(table))}")
        return table[value]

    def refuse(self, name: str, *allowed: Any, why: str) -> None:
        """ConfigError unless the field is absent, None, or one of `allowed`."""
        value = self.default(name, None)
        if value is not None and value not in allowed:
            accepted = " or ".join(map(repr, allowed)) or "its absence"
            raise ConfigError(f"{self.origin}: {name}={value!r} is not supported, only {accepted}: {why}")

    def part(self, name: str) -> Config:
        """A reader over a nested config."""
        return Config(self.take(name), f"{self.origin}.{name}")

    def finish(self) -> None:
        """ConfigError naming every field that matters, is switched on, and was never read."""
        ignored = sorted(n for n in MATTERS & self.values.keys() - self.read if not _off(self.values[n]))
        if ignored:
            listed = ", ".join(f"{n}={self.values[n]!r}" for n in ignored)
            raise ConfigError(f"{self.origin} sets what this family does not know: {listed}")


def _off(value: Any) -> bool:
    """Whether a value says that a field does nothing; True never does, although it equals 1.0."""
    return value is not True and value in OFF
