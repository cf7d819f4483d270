"""What a live Megatron-LM model says about itself: its config or arguments, and what only its modules know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from hasten.errors import UnsupportedModel
from hasten.spec.config import Config

if TYPE_CHECKING:
    from torch import nn


def read(model: nn.Module) -> Config:
    """The fields of `config` and `args` of the model, of what it wraps and its language model, and what modules add.

    Added are `padded_vocab_size`, `max_position_embeddings` and `num_tokentypes` as the tables have them,
    `activation_func` as the name of the function that layer 0 calls ("bias_gelu" for the fused one), and `causal` where
    layer 0 says. UnsupportedModel if there is no language model with layers inside.
    """
    core = getattr(model, "module", model)  # inside Float16Module
    inner = getattr(core, "language_model", None)
    stack = getattr(inner, "encoder", None) or getattr(inner, "transformer", None)
    layers = getattr(stack, "layers", None)
    if inner is None or not layers:
        raise UnsupportedModel(f"{type(model).__name__} has no language_model with the layers of a Megatron-LM model")
    values: dict[str, Any] = {}
    for holder in (model, core, inner):
        for name in ("args", "config"):
            values |= {k: v for k, v in _fields(getattr(holder, name, None)).items() if v is not None}
    layer = layers[0]
    values |= _tables(inner.embedding) | {"activation_func": _act(layer.mlp, values)}
    causal = _causal(layer)
    return Config(values if causal is None else values | {"causal": causal}, f"the config of {type(model).__name__}")


def _fields(source: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", source if isinstance(source, Mapping) else getattr(source, "__dict__", {}))


def _tables(embedding: nn.Module) -> dict[str, int]:
    sizes = {"padded_vocab_size": "word", "max_position_embeddings": "position", "num_tokentypes": "tokentype"}
    tables = {field: getattr(embedding, f"{kind}_embeddings", None) for field, kind in sizes.items()}
    return {field: 0 if table is None else len(table.weight) for field, table in tables.items()}


def _act(mlp: nn.Module, values: Mapping[str, Any]) -> str:
    if getattr(mlp, "bias_gelu_fusion", False):
        return "bias_gelu"
    function = getattr(mlp, "activation_func", values.get("activation_func"))
    return getattr(function, "__name__", str(function))


def _causal(layer: nn.Module) -> bool | None:
    """Whether layer 0 masks the future; None where it does not say (an enum: causal or padding)."""
    kind = getattr(layer, "self_attn_mask_type", None)
    return None if kind is None else getattr(kind, "name", str(kind)) == "causal"
