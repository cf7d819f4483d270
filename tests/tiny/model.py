"""How a tiny model is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

Kind = Literal["decoder", "encoder", "seq2seq", "image", "speech"]


@dataclass(frozen=True)
class Tiny:
    """`make()` gives a fresh random model; `ids` are token ids that may be used, `own` arguments of its forward."""

    make: Callable[[], PreTrainedModel]
    kind: Kind
    ids: tuple[int, int] = (3, 64)
    own: Callable[[], dict[str, Any]] = dict
    attention: str = "sdpa"
    left_padding: bool = True
    states: bool = True  # its own forward gives hidden states, and nobody replaces its layers' forwards to record them
    static: bool | None = True  # transformers itself generates the same with a static cache; None: it generates nothing


def build(tiny: Tiny, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model at every call, every parameter perturbed."""
    torch.manual_seed(0)
    model = tiny.make().eval()
    model.set_attn_implementation(tiny.attention)
    with torch.no_grad():
        seen: set[int] = set()
        for p in model.parameters():
            if p.data_ptr() not in seen:
                p.add_(torch.randn_like(p) * 0.1)
                seen.add(p.data_ptr())
    return model.to(dtype)
