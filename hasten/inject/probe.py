"""Inputs that exercise a model: random, seeded, with padding where the model knows it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hasten.inject.backbone import Backbone
from hasten.spec import Frames, Patches, Tokens

TOKENS = 24  # long enough for several windows of distances, short enough to be cheap


def probe(model: nn.Module, backbones: list[Backbone], seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward, on its device and in its dtype, for every tower that it has."""
    first = next(model.parameters())
    draw = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {}
    for b in backbones:
        match b.tower.embed:
            case Tokens() as e if b.seam.kind == "megatron":
                made.update(_megatron(e, model, draw))
            case Tokens() as e:
                prefix = "decoder_" if b.seam.kind == "seq2seq-decoder" else ""
                made.update(_tokens(e, b, prefix, draw))
            case Patches() as e:
                made["pixel_values"] = torch.randn(2, e.channels, *e.image, generator=draw)
            case Frames() as e:
                made["input_features"] = torch.randn(2, e.mels, 2 * e.positions, generator=draw)
    return {k: v.to(first.device, first.dtype if v.is_floating_point() else None) for k, v in made.items()}


def _tokens(e: Tokens, b: Backbone, prefix: str, draw: torch.Generator) -> dict[str, Tensor]:
    room = TOKENS if e.positions is None else min(TOKENS, e.positions - e.position_offset)
    ids = torch.randint(min(3, e.vocab - 1), e.vocab, (2, room), generator=draw)
    if e.padding is not None:
        ids[ids == e.padding] = (e.padding + 1) % e.vocab
    if prefix:
        return {"decoder_input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, : room // 4] = 0  # the second row is padded on the left
    return {"input_ids": ids, "attention_mask": mask}


def _megatron(e: Tokens, model: nn.Module, draw: torch.Generator) -> dict[str, Tensor]:
    """For a GPTModel the mask that hides the future, for a BertModel one that shows all; their forwards tell which."""
    taken = inspect.signature(getattr(model, "module", model).forward).parameters
    ids = torch.randint(0, e.vocab, (2, min(TOKENS, e.positions or TOKENS)), generator=draw)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)[None, None]
    made = {
        "input_ids": ids,
        "bert_model_input": ids,
        "position_ids": positions,
        "attention_mask": future if "position_ids" in taken else torch.ones_like(ids),
        "tokentype_ids": positions % max(e.types, 1),
    }
    return {name: value for name, value in made.items() if name in taken and (e.types or name != "tokentype_ids")}
