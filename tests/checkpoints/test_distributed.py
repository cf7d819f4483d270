"""Folders of torch.distributed.checkpoint, written by it: plain ones, and as Megatron-Core does."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import hasten
from hasten.checkpoints import open_checkpoint
from hasten.errors import WeightError
from tests.checkpoints.megatron_files import arguments, fused, of_gpt2, padded
from tests.checkpoints.saved import assert_same, empty, tensors
from tests.checkpoints.test_megatron import HEADS, gpt2
from tests.checkpoints.test_megatron_refusals import refused
from tests.tiny import TINY, build

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Two ranks save tensors of a file, cut along the axes that their names end with.
RANKS = """
import sys, warnings, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
def run(rank, state, axes, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    how = {n: Replicate() if axis is None else Shard(axis) for n, axis in axes.items()}
    cut = {n: distribute_tensor(t, mesh, [how[n]]) for n, t in state.items()}
    dcp.save(cut | {"rng_state": [b"x"], "optimizer.state.exp_avg.w": torch.ones(3)}, checkpoint_id=folder)
    dist.destroy_process_group()
if __name__ == "__main__":
    state, axes = torch.load(sys.argv[1])
    torch.multiprocessing.spawn(run, (state, axes, sys.argv[2]), nprocs=2)
"""


def save_on_ranks(state: dict[str, Any], axes: dict[str, int | None], folder: Path) -> None:
    script, held = folder.parent / "ranks.py", folder.parent / "state.pt"
    script.write_text(RANKS)
    torch.save((state, axes), held)
    subprocess.run([sys.executable, "-W", "ignore", script, held, folder], check=True, capture_output=True)


def core_state(model: Any) -> dict[str, Any]:
    """Megatron-Core's whole tensors, all layers stacked, the vocabulary padded."""
    content = of_gpt2(model)
    layers = content["layers"]

    def stack(tensors: Any) -> dict[str, Any]:
        w, b = zip(*tensors, strict=True)
        return {"weight": torch.stack(w), "bias": torch.stack(b)}

    qkv = stack([fused(layer, list(range(HEADS)), 9, 3) for layer in layers])
    names = {"self_attention.linear_proj": "o", "mlp.linear_fc1": "up", "mlp.linear_fc2": "down"}
    state = {f"decoder.layers.self_attention.linear_qkv.{k}": t for k, t in qkv.items()}
    for name, slot in names.items():
        state |= {f"decoder.layers.{name}.{k}": t for k, t in stack([layer[slot] for layer in layers]).items()}
    for name, slot in (("self_attention.linear_qkv.layer_norm", "ln1"), ("mlp.linear_fc1.layer_norm", "ln2")):
        state |= {f"decoder.layers.{name}_{k}": t for k, t in stack([layer[slot] for layer in layers]).items()}
    state |= dict(
        zip(("decoder.final_layernorm.weight", "decoder.final_layernorm.bias"), content["final"], strict=True)
    )
    state["embedding.word_embeddings.weight"] = padded(content["word"], 80)
    state["embedding.position_embeddings.weight"] = content["pos"]
    return {n: t.clone() for n, t in state.items()}


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model, and the folder of two ranks that hold it: rows, columns, layers or nothing cut."""
    model = gpt2()
    folder = tmp_path_factory.mktemp("core") / "iter_0000010"
    state = core_state(model)
    axes: dict[str, int | None] = dict.fromkeys(state)
    axes |= {n: 1 for n in state if "linear_qkv." in n or "fc1." in n} | {"embedding.word_embeddings.weight": 0}
    axes |= {"decoder.layers.self_attention.linear_proj.weight": 2, "decoder.layers.mlp.linear_fc2.weight": 2}
    axes |= {n: 0 for n in state if "layer_norm" in n}  # stages of a pipeline
    save_on_ranks(state, axes, folder)
    said = arguments(of_gpt2(model), HEADS, 2)
    torch.save({"args": Namespace(**said), "checkpoint_version": 3.0, "iteration": 10}, folder / "common.pt")
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("10")
    return model, folder


def test_megatron_cores_folder_gives_the_model(core: tuple[Any, Path]) -> None:
    model, folder = core
    for where in (folder, folder.parent):
        target = empty(model)
        hasten.init_inference(target, checkpoint=where, replace_with_kernel_inject=False)
        assert_same(tensors(target), tensors(model))


def test_slices_are_read_across_chunks(core: tuple[Any, Path]) -> None:
    model, folder = core
    source = open_checkpoint(folder)
    assert not [n for n in source.entries if n.startswith(("optimizer", "rng"))]
    assert {n.split(".")[1] for n in source.entries if n.startswith("layers.")} == {"0", "1", "2", "3"}
    for name, entry in source.entries.items():
        whole = source.read(name)
        assert (tuple(whole.shape), whole.dtype) == (entry.shape, entry.dtype)
        for cut in ((slice(17, 23),), (slice(None), slice(11, 31))[: whole.ndim], (slice(3, 3),)):
            assert torch.equal(source.read(name, cut), whole[cut])


def test_a_plain_folder_holds_a_state_dict(tmp_path: Path) -> None:
    model = build(TINY["llama"])
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "x", no_dist=True)
    target = empty(model)
    hasten.init_inference(target, checkpoint=tmp_path / "x", replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model))


def test_files_that_are_missing_or_cut_off_are_named(tmp_path: Path) -> None:
    dcp.save(core_state(gpt2()), checkpoint_id=tmp_path / "x", no_dist=True)
    (file,) = (tmp_path / "x").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path / "x", f"{file} ends after", "cuts off")
    file.unlink()
    refused(tmp_path / "x", f"{file}: there is no such file")


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_hostile_metadata_is_refused_and_does_not_run(tmp_path: Path) -> None:
    dcp.save(core_state(gpt2()), checkpoint_id=tmp_path / "x", no_dist=True)
    file, mark = tmp_path / "x" / ".metadata", tmp_path / "ran"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = Hostile(mark)
    file.write_bytes(pickle.dumps(metadata))
    refused(tmp_path / "x", str(file), "refused", "system")
    assert not mark.exists()
    for content in (b"", b"\x80", pickle.dumps({"a": 1}), pickle.dumps(metadata)[:50]):
        file.write_bytes(content)
        refused(tmp_path / "x", str(file))


def test_metadata_that_leads_out_of_its_folder(tmp_path: Path) -> None:
    dcp.save(core_state(gpt2()), checkpoint_id=tmp_path / "x", no_dist=True)
    file = tmp_path / "x" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../secret.distcp"
    file.write_bytes(pickle.dumps(metadata))
    refused(tmp_path / "x", "outside its folder", "../secret.distcp")


def test_a_chunk_that_is_another_tensor_is_named(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(3, 4), "b": torch.ones(5)}, checkpoint_id=tmp_path / "x", no_dist=True)
    file = tmp_path / "x" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    places = list(metadata.storage_data)
    first, second = metadata.storage_data[places[0]], metadata.storage_data[places[1]]
    metadata.storage_data[places[0]], metadata.storage_data[places[1]] = second, first
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(WeightError, match="a is not the tensor of"):
        open_checkpoint(tmp_path / "x").read("a")
