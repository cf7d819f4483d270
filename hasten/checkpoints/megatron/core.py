"""Megatron-Core's distributed checkpoints ("torch_dist"): whole tensors already, of which many hold every layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.checkpoints.distributed import Distributed
from hasten.checkpoints.joining import Share, Whole, first
from hasten.checkpoints.megatron.assemble import TOKENS
from hasten.checkpoints.megatron.naming import NO_WEIGHT, plain
from hasten.checkpoints.megatron.source import Megatron
from hasten.checkpoints.pickles import fields_of, load
from hasten.checkpoints.source import Entry, Source
from hasten.errors import WeightError

COMMON = "common.pt"
STACKED = re.compile(r"^((?:module\.)*(?:decoder|encoder)\.layers\.)(?!\d)(.+)$")
"""Names of tensors with an axis of layers in front, since layers are alike."""

CORE = re.compile(r"\.self_attention\.linear_qkv\.weight$")


def open_distributed(folder: Path) -> Source:
    """The Source of a folder of torch.distributed.checkpoint; a Megatron one by its names.

    Raises WeightError with everything that is wrong with it.
    """
    chunks = Distributed(folder)
    if not any(CORE.search(n) for n in chunks.entries):
        return chunks
    arguments = _arguments(folder / COMMON)
    wholes: dict[str, Whole] = {}
    for name, entry in chunks.entries.items():
        if NO_WEIGHT.search(name):
            continue
        if (stacked := STACKED.match(name)) is None:
            wholes[plain(name)] = first([Share(entry, partial(chunks.read, name))])
            continue
        for layer in range(entry.shape[0]):
            inner = Entry(entry.shape[1:], entry.dtype, entry.file)
            share = Share(inner, partial(_layer, chunks, name, layer))
            wholes[plain(f"{stacked[1]}{layer}.{stacked[2]}")] = first([share])
    words = next((n for n in chunks.entries if plain(n) == TOKENS), None)
    ranks = arguments.get("tensor_model_parallel_size") or (chunks.cuts(words) if words else 1)
    return Megatron(str(folder), wholes, 3, arguments, ranks)


def _layer(chunks: Distributed, name: str, layer: int, index: tuple[slice, ...]) -> Tensor:
    return chunks.read(name, (slice(layer, layer + 1), *index))[0]


def _arguments(path: Path) -> Mapping[str, Any]:
    """The arguments of the run in the file of what all ranks share; empty where there is none."""
    if not path.is_file():
        return {}
    content = load(path)
    if not isinstance(content, Mapping):
        raise WeightError(f"{path} holds no dict but a {type(content).__name__}")
    return fields_of(content.get("args"))
