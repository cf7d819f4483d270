"""Megatron-LM's checkpoints: every version, era, split and pipeline of them gives the model that was written."""

from __future__ import annotations

import enum
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from torch import Tensor

import hasten
from hasten.checkpoints import open_checkpoint
from hasten.module_inject.replace_policy import MegatronLayerPolicy
from tests.checkpoints.megatron_files import arguments, of_bert, of_gpt2, of_live, write
from tests.checkpoints.saved import assert_same, empty, tensors
from tests.tiny.megatron import BertModel, Era, Float16Module, GPTModel, ParallelTransformerLayer, build_megatron
from tests.tiny.model import Tiny, build

HEADS, VOCAB = 4, 67
SIZES: dict[str, Any] = {
    "hidden_size": 36, "num_hidden_layers": 4, "num_attention_heads": HEADS, "intermediate_size": 40,
    "vocab_size": VOCAB, "max_position_embeddings": 22,
}  # fmt: skip


def gpt2(**changes: Any) -> Any:
    """9 channels a head, so that no size is a power of two."""
    sizes = {"n_embd": 36, "n_head": HEADS, "n_layer": 4, "n_positions": 22, "vocab_size": VOCAB, "n_inner": 40}
    return build(Tiny(lambda: T.GPT2LMHeadModel(T.GPT2Config(**{**sizes, **changes})), "decoder"))


def bert() -> Any:
    make = lambda: T.MegatronBertForPreTraining(T.MegatronBertConfig(**SIZES))  # noqa: E731
    return build(Tiny(make, "encoder", attention="eager"))


def described(inside: Path, files: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """The description of all files below the folder of an iteration."""
    found = sorted(str(f.relative_to(inside)) for f in inside.glob("*/*.pt"))
    return {"type": "Megatron", "checkpoints": files or found, "base_dir": str(inside), **more}


def loaded(like: Any, where: Any, **more: Any) -> Any:
    target = empty(like)
    hasten.init_inference(target, checkpoint=where, replace_with_kernel_inject=False, **more)
    return target


SPLITS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 2, 2)]
CASES = [
    *((version, "encoder", split) for version in range(4) for split in SPLITS),
    *((3, era, split) for era in ("core", "te") for split in SPLITS),
    *((version, "transformer", (2, 2, 1)) for version in range(4)),
]


@pytest.mark.parametrize(("version", "era", "split"), CASES)
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_every_version_split_and_pipeline_gives_the_model(
    kind: str, version: int, era: str, split: tuple[int, int, int], tmp_path: Path
) -> None:
    ranks, stages, chunks = split
    model = gpt2() if kind == "gpt" else bert()
    content = (of_gpt2 if kind == "gpt" else of_bert)(model)
    inside = write(tmp_path, content, heads=HEADS, ranks=ranks, stages=stages, chunks=chunks, version=version, era=era)
    assert_same(tensors(loaded(model, tmp_path)), tensors(model))
    assert_same(tensors(loaded(model, inside)), tensors(model))


def test_the_fused_model_computes_what_the_written_one_did(tmp_path: Path) -> None:
    model = gpt2()
    write(tmp_path, of_gpt2(model), heads=HEADS, ranks=2)
    engine = hasten.init_inference(empty(model), checkpoint=tmp_path)
    ids = torch.randint(0, VOCAB, (2, 9))
    torch.testing.assert_close(engine(ids).logits, model(ids).logits, atol=2e-5, rtol=2e-5)
    assert engine.explain().backbones[0].calls == 1
    note = next(n for n in engine.explain().notes if n.startswith("checkpoint: "))
    assert "2 files" in note


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("how", ["dict", "file"])
def test_a_description_lists_the_ranks_in_order(how: str, version: float, tmp_path: Path) -> None:
    model = gpt2()
    inside = write(tmp_path, of_gpt2(model), heads=HEADS, ranks=4, version=int(version), says_version=False)
    for rank in range(4):  # names that tell no rank
        (inside / f"mp_rank_{rank:02d}" / "model_optim_rng.pt").rename(inside / f"part{3 - rank}.pt")
    names = [f"part{3 - rank}.pt" for rank in range(4)]
    description: Any = {"type": "Megatron", "version": version, "checkpoints": names, "mp_size": 4}
    if how == "file":
        (inside / "test.json").write_text(json.dumps(description))
        description = inside / "test.json"
    target = empty(model)
    hasten.init_inference(target, checkpoint=description, base_dir=inside, replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model))


def test_listed_pipeline_files_go_stage_by_stage_or_by_their_names(tmp_path: Path) -> None:
    model = gpt2()
    inside = write(tmp_path, of_gpt2(model), heads=HEADS, ranks=2, stages=2)
    assert_same(tensors(loaded(model, described(inside, pp_size=2))), tensors(model))
    for stage in range(2):
        for rank in range(2):
            (inside / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt").rename(inside / f"s{stage}r{rank}.pt")
    names = ["s0r0.pt", "s0r1.pt", "s1r0.pt", "s1r1.pt"]
    assert_same(tensors(loaded(model, described(inside, names, tp_size=2, pp_size=2))), tensors(model))


ERAS = {
    "today": Era(),
    "version 1": Era(1, "transformer", "attention"),
    "version 0": Era(0, "transformer", "attention", tokens_first=False, says_mask_type=False),
}


@pytest.mark.parametrize("era", ERAS.values(), ids=ERAS)
@pytest.mark.parametrize("version", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [GPTModel, BertModel])
@torch.no_grad()
def test_the_tutorials_call_fills_a_live_megatron_module(kind: Any, version: int, era: Era, tmp_path: Path) -> None:
    """The file's order of rows and the module's are two things, and either may be any."""
    model = build_megatron(kind, era)
    content = of_live(model, era.version, 3)
    inside = write(
        tmp_path, content, heads=3, ranks=3, version=version, era="transformer" if version < 2 else "encoder"
    )
    target = build_megatron(kind, era)
    for p in target.parameters():
        p.mul_(-0.5).add_(0.25)
    (inside / "test.json").write_text(json.dumps(described(inside, version=float(version))))
    policy = type("Policy", (MegatronLayerPolicy,), {"version": era.version, "megatron_v2": era.version == 2})
    engine = hasten.init_inference(
        target,
        checkpoint=str(inside / "test.json"),
        module_key="model",
        injection_policy={ParallelTransformerLayer: policy},
    )
    assert_same(engine.module.state_dict(), model.state_dict())
    inputs = _inputs(kind)
    ours, theirs = engine(*inputs), model(*inputs)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=3e-5)


def _inputs(kind: Any) -> tuple[Tensor, ...]:
    ids = torch.randint(0, 70, (2, 9))
    if kind is BertModel:
        return ids, torch.ones(2, 9), torch.zeros_like(ids)
    return ids, torch.arange(9)[None].expand(2, -1), torch.ones(9, 9).triu(1).bool()[None, None]


def test_a_module_inside_float16module_is_filled(tmp_path: Path) -> None:
    model = Float16Module(build_megatron(GPTModel, Era()))
    write(tmp_path, of_live(model.module, 2, 3), heads=3, ranks=3, stages=3, era="te")
    target = Float16Module(build_megatron(GPTModel, Era()))
    with torch.no_grad():
        target.module.language_model.encoder.layers[1].self_attention.query_key_value.weight.zero_()
    hasten.init_inference(target, checkpoint=tmp_path, injection_policy={ParallelTransformerLayer: MegatronLayerPolicy})
    assert_same(target.state_dict(), model.state_dict())


def test_a_base_model_leaves_heads_aside(tmp_path: Path) -> None:
    model = bert()
    write(tmp_path, of_bert(model), heads=HEADS, ranks=2)
    for like, left in ((model.bert, 4), (T.MegatronBertForMaskedLM(model.config), 4)):
        target = empty(like)
        engine = hasten.init_inference(target, checkpoint=tmp_path, replace_with_kernel_inject=False)
        prefix = "" if like is model.bert else "bert."
        assert torch.equal(
            target.get_parameter(f"{prefix}encoder.layer.3.output.dense.weight"),
            model.bert.encoder.layer[3].output.dense.weight,
        )
        notes = [n for n in engine.explain().notes if "left out" in n]
        assert len(notes) == 1 and notes[0].count(",") + 1 >= left


def test_an_untied_head_is_read_and_a_tied_one_fills_an_untied_model(tmp_path: Path) -> None:
    untied = gpt2(tie_word_embeddings=False)
    content = of_gpt2(untied)
    write(tmp_path, content, heads=HEADS)
    target = loaded(untied, tmp_path)
    assert torch.equal(target.lm_head.weight, untied.transformer.wte.weight)
    file = tmp_path / "iter_0000030" / "mp_rank_00" / "model_optim_rng.pt"
    held = torch.load(file, weights_only=True)
    held["model"]["language_model"]["output_layer"] = {"weight": untied.lm_head.weight.detach()}
    torch.save(held, file)
    assert_same(tensors(loaded(untied, tmp_path)), tensors(untied))


def test_slices_touch_and_give_what_is_asked_for(tmp_path: Path) -> None:
    model = gpt2()
    for version in (0, 1, 2):
        folder = tmp_path / str(version)
        write(folder, of_gpt2(model), heads=HEADS, ranks=4, version=version)
        source = open_checkpoint(folder)
        for name, entry in source.entries.items():
            whole = source.read(name)
            assert (tuple(whole.shape), whole.dtype) == (entry.shape, entry.dtype)
            for cut in ((slice(2, 11),), (slice(None), slice(3, 7))[: whole.ndim], (slice(5, 5),), (slice(-3, None),)):
                assert torch.equal(source.read(name, cut), whole[cut])


@pytest.mark.parametrize("version", [0, 1, 2])
def test_rows_of_query_key_value_are_those_of_the_specification(version: int, tmp_path: Path) -> None:
    """h = 4, two heads of two channels: rows named q00 ... v11 by head and channel, two ranks."""
    label = {f"{n}{h}{c}": 100 * i + 10 * h + c for i, n in enumerate("qkv") for h in (0, 1) for c in (0, 1)}
    held = {
        0: ("q00 q01 k00 k01 v00 v01", "q10 q11 k10 k11 v10 v11"),
        1: ("q00 k00 v00 q01 k01 v01", "q10 k10 v10 q11 k11 v11"),
        2: ("q00 q01 k00 k01 v00 v01", "q10 q11 k10 k11 v10 v11"),
    }[version]
    whole = {
        0: "q00 q01 q10 q11 k00 k01 k10 k11 v00 v01 v10 v11",
        1: "q00 k00 v00 q01 k01 v01 q10 k10 v10 q11 k11 v11",
        2: "q00 q01 k00 k01 v00 v01 q10 q11 k10 k11 v10 v11",
    }[version]
    for rank, rows in enumerate(held):
        t = torch.tensor([float(label[r]) for r in rows.split()])
        tree = {"language_model": {"encoder": {"layers.0.self_attention.query_key_value.bias": t}}}
        (tmp_path / f"mp_rank_{rank:02d}").mkdir()
        torch.save(
            {"model": tree, "checkpoint_version": version}, tmp_path / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        )
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    tmp_path.joinpath("release").mkdir()
    for rank in range(2):
        (tmp_path / f"mp_rank_{rank:02d}").rename(tmp_path / "release" / f"mp_rank_{rank:02d}")
    got = open_checkpoint(tmp_path).read("layers.0.self_attention.linear_qkv.bias")
    assert got.tolist() == [label[r] for r in whole.split()]


def test_arguments_beside_the_weights_are_read(tmp_path: Path) -> None:
    model = gpt2()
    content = of_gpt2(model)
    said = arguments(content, HEADS, 2, 2, bias_gelu_fusion=True, norm_epsilon=1e-5)
    write(tmp_path, content, heads=HEADS, ranks=2, stages=2, era="core", arguments=said)
    assert_same(tensors(loaded(model, tmp_path)), tensors(model))


class ModelType(enum.Enum):
    encoder_or_decoder = 1


def test_objects_of_the_trainer_beside_the_weights_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enums and the state of random generators, with nobody's package installed."""
    model = gpt2()
    content = of_gpt2(model)
    monkeypatch.setattr(ModelType, "__module__", "megatron.core.enums")
    package = ModuleType("megatron.core.enums")
    monkeypatch.setitem(sys.modules, "megatron", ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    monkeypatch.setitem(sys.modules, "megatron.core.enums", package)
    package.ModelType = ModelType  # type: ignore[attr-defined]
    said = arguments(content, HEADS, 1, model_type=ModelType.encoder_or_decoder)
    inside = write(tmp_path, content, heads=HEADS, arguments=said)
    path = inside / "mp_rank_00" / "model_optim_rng.pt"
    held = torch.load(path, weights_only=False)
    held["rng_state"] = [{"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}]
    torch.save(held, path)
    for name in ("megatron", "megatron.core", "megatron.core.enums"):
        monkeypatch.delitem(sys.modules, name)
    assert_same(tensors(loaded(model, tmp_path)), tensors(model))
