"""Megatron's models as DeepSpeed saves them: in one piece, or a file for each layer of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.checkpoints.deepspeed.layers import check_layers
from hasten.checkpoints.deepspeed.places import Places
from hasten.checkpoints.deepspeed.states import tensors
from hasten.checkpoints.files import together
from hasten.checkpoints.megatron.naming import plain
from hasten.checkpoints.megatron.places import Rank
from hasten.checkpoints.megatron.shard import Shard
from hasten.checkpoints.megatron.source import Megatron, open_ranks, open_shards
from hasten.checkpoints.pickles import load
from hasten.errors import WeightError

BLOCK = re.compile(r"^(self_)?attention\.query_key_value\.weight$")
TABLES = "word_embeddings.weight"
PIPELINE = 2
"""The order of fused rows in pipelines whose model states do not tell it: they are younger than the others."""


def open_megatron(folder: Path, places: Places) -> Megatron | None:
    """The source of a tag's files, where they hold a model of Megatron's; None where they hold another.

    Raises WeightError with everything that is wrong with the files.
    """
    if places.layers:
        return _pipeline(folder, places)
    module = _content(next(iter(places.models.values()), None)).get("module")
    nested = isinstance(module, Mapping) and any(isinstance(v, Mapping) for v in module.values())
    ranks = {Rank(mp): path for mp, path in places.models.items()}
    return open_ranks(folder, ranks, module_key="module") if nested else None


def _pipeline(folder: Path, places: Places) -> Megatron | None:
    problems: list[str] = []
    ranks: dict[int, dict[int, dict[str, Tensor]]] = {}
    for (layer, mp), path in places.layers.items():
        try:
            ranks.setdefault(mp, {})[layer] = tensors(path, load(path))
        except WeightError as e:
            problems.append(str(e))
    if not any(BLOCK.search(n) for layers in ranks.values() for held in layers.values() for n in held):
        return None
    problems += check_layers(places)
    if problems:
        raise WeightError(together(f"{folder} cannot be loaded", problems))
    said = _content(next(iter(places.models.values()), None))
    arguments = dict(getattr(said.get("args"), "__dict__", {}))
    version = said.get("checkpoint_version")
    shards = {
        Rank(mp): Shard(
            places.folder / f"layer_*-model_{mp:02d}-model_states.pt",
            (_named(layers),),
            version if isinstance(version, (int, float)) else PIPELINE,
            False,
            {n: v for n, v in arguments.items() if n != "pipeline_model_parallel_size"},
            None,
            None,
        )
        for mp, layers in sorted(ranks.items())
    }
    return open_shards(folder, shards)


def _named(layers: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all layers by plain names: what a layer is, its own names tell, and not its number."""
    found: dict[str, Tensor] = {}
    blocks = 0
    for _, held in sorted(layers.items()):
        if any(BLOCK.search(n) for n in held):
            prefix, blocks = f"layers.{blocks}.", blocks + 1
        elif TABLES in held:
            prefix = "embedding."  # so has the tied copy at the end
        else:
            prefix = "final_layernorm." if held.keys() <= {"weight", "bias"} else ""
        found |= {plain("output_layer.weight" if n == "lm_head.weight" else prefix + n): t for n, t in held.items()}
    return found


def _content(path: Path | None) -> Mapping[str, Any]:
    """What a file of model states holds; nothing where it cannot be read, which others tell of."""
    try:
        content = load(path) if path is not None else None
    except WeightError:
        return {}
    return content if isinstance(content, Mapping) else {}
