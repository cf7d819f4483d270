"""Descriptions of type ds_model: whole files, and weights split over ranks, written by hand and by save_split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hasten
from hasten.checkpoints import open_checkpoint
from hasten.checkpoints.save import save_split
from hasten.checkpoints.split import Cut, cuts_of
from hasten.errors import ConfigError, WeightError
from hasten.inject.attach import attach
from tests.checkpoints.saved import assert_same, empty, tensors
from tests.checkpoints.test_megatron_refusals import refused
from tests.tiny import TINY, build

FAMILIES = ["gpt2", "llama", "gpt_neox", "bloom", "phi3", "mixtral", "bert", "opt", "gptj", "falcon", "t5"]


def loaded(like: Any, where: Any, **more: Any) -> Any:
    target = empty(like)
    hasten.init_inference(target, checkpoint=where, replace_with_kernel_inject=False, **more)
    return target


def cuts(model: Any, ranks: int) -> dict[str, Cut]:
    return {n: c for b in attach(model) for n, c in cuts_of(b.bindings, ranks).items()}


@pytest.mark.parametrize("piece", [1 << 30, 20_000])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_split_is_whole_again(name: str, ranks: int, piece: int, tmp_path: Path) -> None:
    if name not in TINY:
        pytest.skip("this release of transformers does not have it")
    model = build(TINY[name])
    how = cuts(model, ranks)
    path = save_split(tmp_path / "x", model.state_dict().items(), how, ranks, piece)
    said = json.loads(path.read_text())
    assert len(said["checkpoints"]["tp"]) % ranks == 0 and said["tp_size"] == ranks
    for where in (path, path.parent, {**said}):
        assert_same(tensors(loaded(model, where)), tensors(model))


def test_each_rank_has_its_share_and_no_more(tmp_path: Path) -> None:
    model = build(TINY["llama"])
    how = cuts(model, 2)
    save_split(tmp_path / "x", model.state_dict().items(), how, 2)
    up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    for rank in range(2):
        held = load_file(tmp_path / "x" / f"tp_{rank:02d}_00.safetensors")
        rows = model.model.layers[1].mlp.up_proj.weight.shape[0] // 2
        assert torch.equal(held[up], model.get_parameter(up)[rank * rows : (rank + 1) * rows])
        assert torch.equal(held[down], model.get_parameter(down)[:, rank * rows : (rank + 1) * rows])
        assert "model.embed_tokens.weight" not in held
    assert "model.embed_tokens.weight" in load_file(tmp_path / "x" / "non-tp.safetensors")


def test_fused_tensors_are_shared_part_by_part(tmp_path: Path) -> None:
    """Each rank of GPT-2 has queries, keys and values of its own heads, and its matrices are stored (in, out)."""
    model = build(TINY["gpt2"])
    heads, width = model.config.n_head, model.config.n_embd
    save_split(tmp_path / "x", model.state_dict().items(), cuts(model, heads), heads)
    name, d = "transformer.h.1.attn.c_attn.weight", width // heads
    whole = model.get_parameter(name)
    for rank in range(heads):
        own = [part * width + rank * d + c for part in range(3) for c in range(d)]
        assert torch.equal(load_file(tmp_path / "x" / f"tp_{rank:02d}_00.safetensors")[name], whole[:, own])


def test_heads_that_do_not_divide_stay_whole() -> None:
    """Six heads and two of keys and values for four ranks, although the rows of both would divide."""
    how = cuts(build(TINY["llama"]), 4)
    assert not [n for n in how if ".self_attn." in n]
    assert "model.layers.1.mlp.up_proj.weight" in how


def by_hand(model: Any, ranks: int, how: dict[str, Cut], folder: Path, ending: str, pieces: int = 1) -> dict[str, Any]:
    """Files of ranks as others write them: nothing says how tensors are cut; what is not cut is in every file."""
    names: list[str] = []
    state = model.state_dict()
    keys = list(state)
    folder.mkdir()
    for piece in range(pieces):
        for rank in range(ranks):
            held: dict[str, Tensor] = {}
            for key in keys[piece::pieces]:
                t, cut = state[key], how.get(key)
                if cut is not None:
                    sizes = [n * t.shape[cut.axis] // sum(cut.parts) for n in cut.parts]
                    t = torch.cat([p.chunk(ranks, cut.axis)[rank] for p in t.split(sizes, cut.axis)], cut.axis)
                held[key] = t.clone().contiguous()
            names.append(f"r{rank}p{piece}.{ending}")
            (save_file if ending == "safetensors" else torch.save)(held, folder / names[-1])
    described: dict[str, Any] = {"type": "ds_model", "version": 1.0, "parallelization": "tp", "tp_size": ranks}
    return {**described, "checkpoints": names, "base_dir": str(folder)}


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "phi3", "bert"])
def test_shares_are_joined_by_what_the_model_is(name: str, pieces: int, ending: str, tmp_path: Path) -> None:
    model = build(TINY[name])
    where = by_hand(model, 2, cuts(model, 2), tmp_path / "x", ending, pieces)
    assert_same(tensors(loaded(model, where)), tensors(model))


def test_files_of_whole_tensors_are_one_checkpoint(tmp_path: Path) -> None:
    model = build(TINY["bloom"])
    where = by_hand(model, 1, {}, tmp_path / "x", "pt", 3)
    for kind, how in (("BLOOM", {}), ("ds_model", {"parallelization": "pp"})):
        described = {k: v for k, v in where.items() if k not in ("parallelization", "tp_size")} | how | {"type": kind}
        assert_same(tensors(loaded(model, described)), tensors(model))
    described = {"type": "ds_model", "version": 1.0, "checkpoints": str(tmp_path / "x")}
    assert_same(tensors(loaded(model, described)), tensors(model))


def test_blooms_shards_lack_the_prefix(tmp_path: Path) -> None:
    model = build(TINY["bloom"])
    state = {n.removeprefix("transformer."): t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    torch.save(state, tmp_path / "a.bin")
    assert_same(tensors(loaded(model, {"type": "bloom", "checkpoints": ["a.bin"]}, base_dir=tmp_path)), tensors(model))


def test_everything_wrong_with_split_files_is_listed(tmp_path: Path) -> None:
    model = build(TINY["llama"])
    path = save_split(tmp_path / "x", model.state_dict().items(), cuts(model, 2), 2)
    (path.parent / "tp_01_00.safetensors").unlink()
    refused(path, f"{path.parent}/tp_01_00.safetensors: there is no such file", model=model)
    where = by_hand(model, 2, cuts(model, 2), tmp_path / "y", "pt")
    refused(where | {"tp_size": 3}, "2 files, no multiple of tp_size=3", error=ConfigError)
    file = tmp_path / "y" / "r1p0.pt"
    held = torch.load(file)
    up = "model.layers.1.mlp.up_proj.weight"
    shape, whole = tuple(held[up].shape), tuple(model.get_parameter(up).shape)
    del held[up]
    torch.save(held, file)
    refused(where, f"{up} ({tmp_path}/y/r0p0.pt) is {shape}, the model's is {whole}", model=model)
    path = save_split(tmp_path / "z", model.state_dict().items(), cuts(model, 2), 2)
    lacking = load_file(tmp_path / "z" / "tp_01_00.safetensors")
    del lacking[up]
    save_file(lacking, tmp_path / "z" / "tp_01_00.safetensors")
    refused(path, f"{up} ({tmp_path}/z/tp_00_00.safetensors): 1 of 2 ranks have it", model=model)


def test_a_description_in_a_folder_may_not_lead_out_of_it(tmp_path: Path) -> None:
    model = build(TINY["llama"])
    path = save_split(tmp_path / "x", model.state_dict().items(), {}, 1)
    said = json.loads(path.read_text())
    said["checkpoints"]["non_tp"] = ["../secret.safetensors"]
    path.write_text(json.dumps(said))
    refused(path.parent, "outside its folder", "../secret.safetensors", error=ConfigError)


def test_a_moved_folder_is_found_beside_its_description(tmp_path: Path) -> None:
    model = build(TINY["gpt2"])
    save_split(tmp_path / "x", model.state_dict().items(), cuts(model, 2), 2)
    (tmp_path / "x").rename(tmp_path / "y")
    assert_same(tensors(loaded(model, tmp_path / "y")), tensors(model))


def test_a_tied_tensor_is_written_once(tmp_path: Path) -> None:
    model = build(TINY["gpt2"])
    path = save_split(tmp_path / "x", model.state_dict().items(), cuts(model, 2), 2)
    held = open_checkpoint(path).entries
    assert "transformer.wte.weight" in held and "lm_head.weight" not in held


def test_a_folder_with_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        save_split(tmp_path, [], {}, 2)
    with pytest.raises(ConfigError, match="cannot be cut for 2 ranks"):
        save_split(tmp_path / "x", [("a", torch.ones(3, 2))], {"a": Cut(0)}, 2)


def test_splits_that_are_wrong_are_refused(tmp_path: Path) -> None:
    model = build(TINY["gpt2"])
    path = save_split(tmp_path / "x", model.state_dict().items(), cuts(model, 2), 2)
    said = json.loads(path.read_text())
    for odd in ("x", [0], [0, [0]], [0, []], [-1, [1]]):
        refused({**said, "splits": {"a": odd}}, "splits must give", error=ConfigError)
    message = refused({**said, "splits": {**said["splits"], "gone": [0, [1]]}}, "no file holds gone", error=WeightError)
    assert "problems" not in message


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bert"])
def test_init_inference_saves_what_it_loads_again(name: str, tmp_path: Path) -> None:
    """The fused model's weights, interleaved ones too, in the dtype of the cast."""
    model = build(TINY[name])
    engine = hasten.init_inference(build(TINY[name]), dtype="bf16", save_mp_checkpoint_path=tmp_path / "x")
    wanted = {n: t.clone() for n, t in engine.module.state_dict().items()}
    assert {e.dtype for e in open_checkpoint(tmp_path / "x").entries.values()} == {torch.bfloat16}
    again = hasten.init_inference(empty(model), checkpoint=tmp_path / "x", dtype="bf16")
    assert_same(dict(again.module.state_dict()), wanted)


def test_a_folder_that_cannot_be_written_to_leaves_the_model(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    model = build(TINY["gpt2"])
    before = {n: t.clone() for n, t in tensors(model).items()}
    with pytest.raises(ConfigError, match="is not empty"):
        hasten.init_inference(model, save_mp_checkpoint_path=tmp_path)
    assert_same(tensors(model), before)
    hasten.init_inference(model)
