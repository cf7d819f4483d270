"""init_inference(model, checkpoint=...): what from_pretrained gives, in the model that is there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import hasten
from hasten.errors import WeightError
from tests.checkpoints.saved import SHARDED, WHOLE, assert_same, empty, other, save, saved, tensors
from tests.families.test_all import call
from tests.tiny import TINY, build

FAMILIES = ["llama", "gpt2", "gpt_neox", "bert", "t5", "vit"]
UNUSUAL = ["mixtral", "bart", "gptj", "xglm", "clip", "albert", "whisper", "opt-350m"]


def outputs(model: Any, name: str) -> list[torch.Tensor]:
    torch.manual_seed(1)  # the same tokens each time
    with torch.no_grad():
        return [t for t in model(**call(name)).to_tuple() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("live", [False, True], ids=["meta", "live"])
@pytest.mark.parametrize("size", [SHARDED, WHOLE], ids=["sharded", "whole"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_filled_model_is_what_from_pretrained_gives(
    name: str, kind: str, size: str, live: bool, tmp_path: Path
) -> None:
    model = saved(name, tmp_path, kind, size)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation).eval()
    target = other(name) if live else empty(model)
    engine = hasten.init_inference(target, checkpoint=tmp_path, replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(loaded))
    for ours, theirs in zip(outputs(engine, name), outputs(loaded, name), strict=True):
        assert torch.equal(ours, theirs)
    assert not target.training and any(n.startswith("checkpoint: ") for n in engine.explain().notes)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fused_model_is_that_of_from_pretrained(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation).eval()
    ours = hasten.init_inference(empty(model), {"checkpoint": str(tmp_path)})
    theirs = hasten.init_inference(loaded)
    for a, b in zip(outputs(ours, name), outputs(theirs, name), strict=True):
        assert torch.equal(a, b)
    assert ours.explain().backbones[0].calls == 1


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_families_store_in_their_own_way_is_found(name: str, tmp_path: Path) -> None:
    if name not in TINY:
        pytest.skip("this release of transformers does not have it")
    model = saved(name, tmp_path)
    target = empty(model)
    hasten.init_inference(target, checkpoint=tmp_path, replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model))


@pytest.mark.parametrize("live", [False, True], ids=["meta", "live"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_dtype_that_was_asked_for_comes_from_the_files_precision(name: str, live: bool, tmp_path: Path) -> None:
    model = saved(name, tmp_path)  # float32
    target = other(name).to(torch.float16) if live else empty(model)
    engine = hasten.init_inference(target, checkpoint=tmp_path, dtype="bf16", replace_with_kernel_inject=False)
    wanted = {n: t.to(torch.bfloat16) for n, t in model.named_parameters(remove_duplicate=False)}
    assert_same(dict(target.named_parameters(remove_duplicate=False)), wanted)
    if not live:  # rotary frequencies and the like keep their precision
        assert_same(dict(target.named_buffers()), dict(model.named_buffers()))
    assert engine.explain().dtype == "bfloat16"


def test_without_a_dtype_the_model_keeps_its_own(tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    target = empty(model).to(torch.float16)
    hasten.init_inference(target, checkpoint=tmp_path)
    assert {p.dtype for p in target.parameters()} == {torch.float16}


@pytest.mark.parametrize("buffers", [False, True], ids=["", "buffers"])
@pytest.mark.parametrize("name", FAMILIES)
def test_accelerates_empty_models_are_filled(name: str, buffers: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = saved(name, tmp_path)
    with accelerate.init_empty_weights(include_buffers=buffers):
        target = type(model)(copy.deepcopy(model.config))
    hasten.init_inference(target, checkpoint=tmp_path, replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model))


def test_ties_that_accelerate_broke_are_as_broken_after_a_refusal() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build(TINY["gpt2"])
    with accelerate.init_empty_weights():
        target = type(model)(copy.deepcopy(model.config))
    before = tensors(target)
    with pytest.raises(WeightError, match="missing"):
        hasten.init_inference(target, checkpoint={"transformer.wte.weight": model.lm_head.weight.detach()})
    assert all(tensors(target)[n] is t for n, t in before.items())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_tied_tensors_stay_one(name: str, kind: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path, kind)
    target = empty(model)
    hasten.init_inference(target, checkpoint=tmp_path, replace_with_kernel_inject=False)
    head = target.get_output_embeddings().weight  # type: ignore[union-attr]
    assert head is target.get_input_embeddings().weight
    assert len(list(target.parameters())) == len(list(model.parameters()))


def test_a_tie_is_filled_from_whichever_name_is_stored() -> None:
    model = build(TINY["gpt2"])
    state = model.state_dict()
    del state["transformer.wte.weight"]
    target = empty(model)
    hasten.init_inference(target, checkpoint=state)
    assert torch.equal(target.transformer.wte.weight, model.lm_head.weight)


def test_a_state_dict_is_copied_and_not_kept() -> None:
    model = build(TINY["llama"])
    target = empty(model)
    hasten.init_inference(target, checkpoint=model.state_dict(), replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model))
    assert target.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


@pytest.mark.parametrize(("name", "prefix"), [("llama", "model"), ("gpt2", "transformer"), ("bert", "bert")])
def test_the_base_models_names_do_with_and_without_prefix(name: str, prefix: str) -> None:
    model = build(TINY[name])
    plain = {n.removeprefix(f"{prefix}."): t for n, t in model.state_dict().items()}
    target = empty(model)
    hasten.init_inference(target, checkpoint=plain, replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m"])
def test_a_base_model_leaves_the_heads_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    base = empty(model.base_model)
    engine = hasten.init_inference(base, checkpoint=tmp_path, replace_with_kernel_inject=False)
    wanted = tensors(model.base_model)
    assert_same({n: t for n, t in tensors(base).items() if n in wanted}, wanted)
    left = [n for n in engine.explain().notes if "left out" in n]
    assert len(left) == (name == "llama")  # the heads of the others are their embeddings


def test_old_names_of_norms_are_renamed() -> None:
    model = build(TINY["bert"])
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old: dict[str, torch.Tensor] = {}
    for name, t in model.state_dict().items():
        end = next((e for e in renamed if name.endswith(e)), "")
        old[name.removesuffix(end) + renamed.get(end, "")] = t
    assert old.keys() != model.state_dict().keys()
    target = empty(model)
    hasten.init_inference(target, checkpoint=old, replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model))


def test_buffers_that_old_checkpoints_hold_are_ignored() -> None:
    model = build(TINY["llama"])
    old = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    target = empty(model)
    hasten.init_inference(target, checkpoint=old, replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_masks_that_old_checkpoints_hold_are_ignored_and_other_tensors_of_their_name_are_not(prefix: str) -> None:
    model = build(TINY["gpt_neo"])
    old = {n.removeprefix("transformer."): t for n, t in model.state_dict().items()}
    old = {prefix + n: t for n, t in old.items()}
    old[f"{prefix}h.0.attn.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    target = empty(model)
    hasten.init_inference(target, checkpoint=old, replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model))
    old[f"{prefix}h.0.attn.attention.gate.bias"] = torch.ones(3)
    with pytest.raises(WeightError, match=rf"unexpected: {prefix}h.0.attn.attention.gate.bias"):
        hasten.init_inference(empty(model), checkpoint=old, replace_with_kernel_inject=False)


def test_what_a_class_may_lack_is_initialised_or_kept() -> None:
    model = build(TINY["bart"])
    state = model.state_dict()
    del state["final_logits_bias"]
    target = empty(model)
    hasten.init_inference(target, checkpoint=state, replace_with_kernel_inject=False)
    assert torch.equal(target.final_logits_bias, torch.zeros_like(model.final_logits_bias))
    target = other("bart")
    target.final_logits_bias.fill_(3)
    hasten.init_inference(target, checkpoint=state, replace_with_kernel_inject=False)
    assert torch.equal(target.final_logits_bias, torch.full_like(model.final_logits_bias, 3))


def test_a_parameter_that_a_class_may_lack_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(TINY["llama"])
    state = model.state_dict()
    del state["model.norm.weight"]
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_missing", [r"model\.norm"])
    target = empty(model)
    hasten.init_inference(target, checkpoint=state, replace_with_kernel_inject=False)
    assert torch.equal(target.model.norm.weight, torch.ones(48))


def test_a_live_models_tensors_stay_where_they_are(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    target = other("llama")
    before = {n: t.data_ptr() for n, t in tensors(target).items()}
    hasten.init_inference(target, checkpoint=tmp_path, replace_with_kernel_inject=False)
    assert {n: t.data_ptr() for n, t in tensors(target).items()} == before


def test_revert_gives_the_filled_model(tmp_path: Path) -> None:
    model = saved("gpt_neox", tmp_path)
    target = empty(model)
    hasten.init_inference(target, checkpoint=tmp_path).revert()
    assert_same(tensors(target), tensors(model))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_where_a_folder_has_both_safetensors_are_read(kind: str, tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    wrong = other("llama")
    save(wrong, tmp_path, "bin")
    target = empty(model)
    file = tmp_path if kind == "safetensors" else tmp_path / "pytorch_model.bin.index.json"
    hasten.init_inference(target, checkpoint=file, replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model if kind == "safetensors" else wrong))


def test_base_dir_is_where_a_relative_path_begins(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "weights")
    target = empty(model)
    hasten.init_inference(target, checkpoint="weights", base_dir=tmp_path)
    assert_same(dict(target.named_buffers()), dict(model.named_buffers()))
    for ours, theirs in zip(outputs(target, "llama"), outputs(model, "llama"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_modules_without_a_config_are_filled() -> None:
    values = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with torch.device("meta"):
        target = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    hasten.init_inference(target, checkpoint=values.state_dict(), replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(values))


def test_a_module_under_two_names_is_filled_from_either() -> None:
    def shared() -> nn.Module:
        layer = nn.Linear(3, 3)
        return nn.ModuleDict({"a": layer, "b": layer})

    values = shared().state_dict()
    with torch.device("meta"):
        target = shared()
    only = {n: t for n, t in values.items() if n.startswith("b.")}
    hasten.init_inference(target, checkpoint=only, replace_with_kernel_inject=False)
    assert torch.equal(target.get_submodule("a").weight, values["a.weight"])
    assert target.get_submodule("a").weight is target.get_submodule("b").weight


def test_tensors_that_modules_keep_as_plain_attributes_are_made_again() -> None:
    class Table(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.linear = nn.Linear(3, config)
            self.register_buffer("table", torch.arange(config) / 7, persistent=False)
            self.alias = self.table

    values = Table(4)
    with torch.device("meta"):
        target = Table(4)
    hasten.init_inference(target, checkpoint=values.state_dict(), replace_with_kernel_inject=False)
    assert torch.equal(target.alias, values.table) and target.alias is target.table


def test_more_than_ten_experts_are_stacked_in_order(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 12}
    model = T.MixtralForCausalLM(T.MixtralConfig(**sizes, **heads)).eval()
    save(model, tmp_path)
    target = empty(model)
    hasten.init_inference(target, checkpoint=tmp_path, replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model))


def test_a_buffer_that_nothing_can_compute_is_named() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.register_buffer("table", torch.ones(4), persistent=False)

    values = Table()
    with torch.device("meta"):
        target = Table()
    with pytest.raises(WeightError, match="does not give the values of table"):
        hasten.init_inference(target, checkpoint=values.state_dict(), replace_with_kernel_inject=False)
    assert target.linear.weight.is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["meta", "accelerate", "live"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_filled_on_the_gpu(name: str, how: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    target = other(name) if how == "live" else empty(model)
    if how == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        with accelerate.init_empty_weights():
            target = type(model)(copy.deepcopy(model.config))
    hasten.init_inference(target, checkpoint=tmp_path, device="cuda:0", replace_with_kernel_inject=False)
    assert {str(t.device) for t in tensors(target).values()} == {"cuda:0"}
    assert_same({n: t.cpu() for n, t in tensors(target).items()}, tensors(model))
