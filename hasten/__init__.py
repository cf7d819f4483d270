"""Hasten makes a live PyTorch transformer fast where it stands: `engine = hasten.init_inference(model)`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from hasten.inject.engine import InferenceEngine

__version__ = "0.1.0"
__all__ = ["InferenceEngine", "init_inference"]

_LATE = {"InferenceEngine": "hasten.inject.engine", "module_inject": "hasten", "errors": "hasten"}


def init_inference(
    model: nn.Module, config: str | os.PathLike[str] | Mapping[str, Any] | None = None, **kwargs: Any
) -> InferenceEngine:
    """Make `model` fast where it stands, and give the engine that serves it.

    config: a dict or the path of a JSON file, as DeepSpeed-Inference takes it; kwargs: the same keys. docs/api.md lists
    them. Raises ConfigError, WeightError or UnsupportedModel, and then the model is as it was.
    """
    from hasten.inject.api import init_inference as start  # transformers is imported at the first use only

    return start(model, config, **kwargs)


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    if _LATE[name] == "hasten":
        return importlib.import_module(f"hasten.{name}")
    return getattr(importlib.import_module(_LATE[name]), name)
