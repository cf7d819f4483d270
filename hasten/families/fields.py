"""Readers of fields that many configs share: activations, head sizes, windows, rotary embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hasten.errors import ConfigError
from hasten.spec import Dynamic, Linear, Llama3, LongRope, Rope, Scaling, Yarn
from hasten.spec.config import Config

ACT = {
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""transformers' names of activations, and ours."""


def act(c: Config, name: str = "hidden_act") -> str:
    return c.choose(name, ACT)


def layer_types(c: Config, layers: int, otherwise: str) -> list[str]:
    """`full_attention` or `sliding_attention` for each layer; all alike where the config does not say."""
    kinds = c.default("layer_types", None)
    if kinds is None:
        return [otherwise] * layers
    c.default("sliding_window", None)  # read by the sliding layers, of which there may be none
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != layers:
        accepted = f"full_attention or sliding_attention for each of {layers} layers"
        raise ConfigError(f"{c.origin}: layer_types must give {accepted}, got {kinds}")
    return kinds


def rope(c: Config, head_dim: int, *, kind: str | None = None, share: float = 1.0, pairing: Any = "halves") -> Rope:
    """The rotary embedding of a config, of layers of one kind where it has several.

    transformers 5 keeps all in `rope_parameters`; 4 has `rope_theta`, `rope_scaling` and `partial_rotary_factor`, and
    where kinds differ it scales layers without a window alone. share: of each head that rotates, where the config does
    not say.
    """
    p, old = dict(c.default("rope_parameters", {})), dict(c.default("rope_scaling", {}))
    if not p and kind == "sliding_attention":
        return Rope(int(head_dim * share), float(c.take("rope_local_base_freq", "rope_theta")), pairing)
    p = dict(p[kind]) if kind in p else p
    p = {**old, **p}
    theta = c.default("rope_theta", 10000.0, "rotary_emb_base")
    part = c.default("partial_rotary_factor", share, "rotary_pct")
    dim = int(head_dim * (p.get("partial_rotary_factor") or part))
    return Rope(dim, float(p.get("rope_theta") or theta), pairing, scaling(p, c))


def scaling(p: Mapping[str, Any], c: Config) -> Scaling | None:
    """The scaling that a rope dictionary asks for (transformers' `rope_scaling` or `rope_parameters`)."""
    kind = p.get("rope_type", p.get("type", "default"))
    try:
        return _scaling(kind, p, c)
    except KeyError as missing:
        raise ConfigError(f"{c.origin}: rope type {kind!r} needs {missing}, and has only {sorted(p)}") from None


def _scaling(kind: str, p: Mapping[str, Any], c: Config) -> Scaling | None:
    most = c.default("max_position_embeddings", None)
    original = p.get("original_max_position_embeddings") or c.default("original_max_position_embeddings", None) or most
    match kind:
        case "default":
            return None
        case "linear":
            return Linear(float(p["factor"]))
        case "dynamic":
            return Dynamic(float(p["factor"]), most)
        case "llama3":
            return Llama3(float(p["factor"]), float(p["low_freq_factor"]), float(p["high_freq_factor"]), original)
        case "yarn":
            return _yarn(p, original, most)
        case "longrope" | "su":
            older = "rope_parameters" not in c.values and c.default("original_max_position_embeddings", None)
            return _longrope({**p, "factor": most / older} if older else p, original, most)  # 4 overrides the factor
        case _:
            known = "default, linear, dynamic, llama3, yarn, longrope"
            raise ConfigError(f"{c.origin}: rope type {kind!r} is not one of {known}")


def _yarn(p: Mapping[str, Any], original: int, most: int) -> Yarn:
    factor = p.get("factor") or most / original
    one, all_dims = p.get("mscale"), p.get("mscale_all_dim")
    magnitude = p.get("attention_factor")
    if magnitude is None:
        magnitude = _mscale(factor, one) / _mscale(factor, all_dims) if one and all_dims else _mscale(factor, 1.0)
    fast, slow = p.get("beta_fast") or 32.0, p.get("beta_slow") or 1.0
    return Yarn(float(factor), original, float(fast), float(slow), float(magnitude), bool(p.get("truncate", True)))


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(p: Mapping[str, Any], original: int, most: int) -> LongRope:
    factor = p.get("factor") or most / original
    magnitude = p.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (tuple(map(float, p[name])) for name in ("short_factor", "long_factor"))
    return LongRope(short, long, original, float(magnitude))
