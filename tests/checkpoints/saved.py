"""Checkpoints of tiny models on disk, and the same models without values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers as T
from torch import Tensor

from tests.tiny import TINY, build

SHARDED, WHOLE = "20KB", "1GB"


def save(model: T.PreTrainedModel, folder: Path, kind: str = "safetensors", size: str = SHARDED) -> Path:
    """Write the model as transformers does; .bin by the library under it, since transformers 5 no longer does."""
    if kind == "safetensors":
        model.save_pretrained(folder, max_shard_size=size)
    else:
        model.config.save_pretrained(folder)
        state = model.state_dict()
        huggingface_hub.save_torch_state_dict(state, folder, safe_serialization=False, max_shard_size=size)
    return folder


def saved(name: str, folder: Path, kind: str = "safetensors", size: str = SHARDED) -> T.PreTrainedModel:
    """The tiny model of that name, with its weights in the folder."""
    model = build(TINY[name])
    save(model, folder, kind, size)
    return model


def empty(model: T.PreTrainedModel, **changes: Any) -> T.PreTrainedModel:
    """A model like it on the meta device, with changes to its config."""
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = model.config._attn_implementation
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return type(model)(config)


def other(name: str) -> T.PreTrainedModel:
    """The tiny model of that name with other values in every parameter."""
    model = build(TINY[name])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-0.5).add_(0.25)
    return model


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, non-persistent ones too, under each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit, under the same names, in the same dtypes."""
    assert ours.keys() == theirs.keys()
    different = [n for n, t in ours.items() if t.dtype != theirs[n].dtype or not torch.equal(t, theirs[n])]
    assert different == []
