"""Megatron's models trained by DeepSpeed: one file for each rank, or one for each layer of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import WeightError
from tests.checkpoints.megatron_files import LEGACY, layer_of, of_gpt2, padded, share, write
from tests.checkpoints.saved import assert_same, tensors
from tests.checkpoints.test_megatron import HEADS, gpt2, loaded


def pipeline(folder: Path, model: Any, ranks: int, version: int, *, copy: bool, says: bool = True) -> Path:
    """Layers as Megatron-DeepSpeed numbers them: 1 the tables, blocks, a gap, the norm, and a copy of the tables."""
    whole, inside = of_gpt2(model), folder / "global_step5"
    inside.mkdir(parents=True)
    (folder / "latest").write_text(inside.name)
    rows = -(-len(whole["word"]) // (8 * ranks)) * 8 * ranks
    for r in range(ranks):
        tables = {"word_embeddings.weight": share(padded(whole["word"], rows), 0, r, ranks)}
        layers: dict[int, dict[str, Tensor]] = {1: {**tables, "position_embeddings.weight": whole["pos"]}}
        for i, layer in enumerate(whole["layers"]):
            layers[2 + i] = layer_of(layer, r, ranks, HEADS, version, LEGACY, "self_attention")
        end = len(whole["layers"]) + 3
        layers[end] = dict(zip(("weight", "bias"), whole["final"], strict=True))
        layers |= {end + 1: tables} if copy else {}
        for i, held in layers.items():
            torch.save(held, inside / f"layer_{i:02d}-model_{r:02d}-model_states.pt")
        said = {"checkpoint_version": float(version)} if says else {}
        torch.save({"module": None, **said}, inside / f"mp_rank_{r:02d}_model_states.pt")
    return inside


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(("ranks", "version", "says"), [(1, 3, True), (2, 3, False), (4, 0, True), (2, 2, False)])
def test_layers_of_a_pipeline_become_a_model(ranks: int, version: int, says: bool, copy: bool, tmp_path: Path) -> None:
    model = gpt2()
    pipeline(tmp_path, model, ranks, version, copy=copy, says=says)
    assert_same(tensors(loaded(model, tmp_path)), tensors(model))


def test_a_layer_that_a_rank_lacks(tmp_path: Path) -> None:
    inside = pipeline(tmp_path, gpt2(), 2, 3, copy=True)
    (inside / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(WeightError, match="no file of layer 3, tensor-parallel rank 1"):
        loaded(gpt2(), tmp_path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nested_modules_of_ranks(ranks: int, tmp_path: Path) -> None:
    model = gpt2()
    there = write(tmp_path / "megatron", of_gpt2(model), heads=HEADS, ranks=ranks, version=3)
    inside = tmp_path / "both" / "global_step5"
    inside.mkdir(parents=True)
    (inside.parent / "latest").write_text(inside.name)
    (inside.parent / "latest_checkpointed_iteration.txt").write_text("5")  # Megatron-DeepSpeed writes both
    for r in range(ranks):
        content = torch.load(there / f"mp_rank_{r:02d}" / "model_optim_rng.pt", weights_only=True)
        torch.save(
            {"module": content["model"], "checkpoint_version": 3.0, "iteration": 5},
            inside / f"mp_rank_{r:02d}_model_states.pt",
        )
    assert_same(tensors(loaded(model, inside.parent)), tensors(model))
