"""What checkpoint= refuses: one error with file and tensor, and the model as it was, on the meta device or not."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hasten
from hasten.checkpoints import StateDict
from hasten.errors import ConfigError, HastenError, WeightError
from tests.checkpoints.saved import WHOLE, assert_same, empty, other, saved, tensors
from tests.tiny import TINY, build

UP = "model.layers.1.mlp.up_proj.weight"


def refused(where: Any, error: type[HastenError], *parts: str, name: str = "llama", **changes: Any) -> None:
    """`checkpoint=where` fails with all parts in the message, for a model on meta and a live one, which stay."""
    for model in (empty(build(TINY[name]), **changes), *([] if changes else [other(name)])):
        before, mode = tensors(model), [m.training for m in model.modules()]
        values = {n: t.clone() for n, t in before.items()}
        with pytest.raises(error) as caught:
            hasten.init_inference(model, checkpoint=where, replace_with_kernel_inject=False)
        for part in parts:
            assert part in str(caught.value)
        after = tensors(model)
        assert all(after[n] is t for n, t in before.items()) and after.keys() == before.keys()
        assert [m.training for m in model.modules()] == mode
        if not next(model.parameters()).is_meta:
            assert_same(after, values)


def shard_of(folder: Path, name: str, kind: str = "safetensors") -> Path:
    (index,) = folder.glob(f"*.{kind}.index.json")
    return folder / json.loads(index.read_text())["weight_map"][name]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_missing_shard(kind: str, tmp_path: Path) -> None:
    saved("llama", tmp_path, kind)
    file = shard_of(tmp_path, UP, kind)
    file.unlink()
    refused(tmp_path, WeightError, f"{file}: there is no such file", UP)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_that_promises_what_no_file_has(kind: str, tmp_path: Path) -> None:
    saved("llama", tmp_path, kind)
    (index,) = tmp_path.glob("*.index.json")
    content = json.loads(index.read_text())
    file = tmp_path / content["weight_map"][UP]
    content["weight_map"]["model.layers.9.x"] = file.name
    content["weight_map"]["model.layers.9.y"] = f"gone.{kind}"
    index.write_text(json.dumps(content))
    refused(tmp_path, WeightError, f"{file}: no tensor model.layers.9.x", f"{tmp_path}/gone.{kind}: there is no such")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 99999]
)
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(text)
    refused(tmp_path, WeightError, str(file))


def test_an_index_that_leads_out_of_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    refused(tmp_path, WeightError, str(file), "outside its folder", "secret")


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -20000])
def test_truncated_safetensors(keep: int, tmp_path: Path) -> None:
    saved("llama", tmp_path, size=WHOLE)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    parts = [f"{file} is no whole safetensors file"]
    refused(tmp_path, WeightError, *parts, *(["cuts off model.", ".weight"] if keep < 0 else []))


def test_a_truncated_shard_names_its_tensor(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    file = shard_of(tmp_path, UP)
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, WeightError, str(file), "cuts off", UP)


@pytest.mark.parametrize("keep", [0, 100, -1000, -1])
def test_truncated_pickles(keep: int, tmp_path: Path) -> None:
    saved("llama", tmp_path, "bin", WHOLE)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, WeightError, str(file), "damaged")


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_runs_code_does_not_run(tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), "b": Hostile(mark)}, file)
    refused(tmp_path, WeightError, str(file), "refused", "posix.system")
    file.write_bytes(pickle.dumps({"b": Hostile(mark)}))
    refused(tmp_path, WeightError, str(file))
    torch.save({"b": Hostile(mark)}, file, _use_new_zipfile_serialization=False)
    refused(tmp_path, WeightError, str(file))
    assert not mark.exists()
    os.system(f"touch {mark}")  # what it would have done
    assert mark.exists()


class Foreign:
    pass


def test_a_pickle_with_foreign_classes(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), "b": Foreign()}, file)
    refused(tmp_path, WeightError, str(file), "test_refusals.Foreign")
    with pytest.raises(WeightError) as caught:
        hasten.init_inference(empty(build(TINY["llama"])), checkpoint=file)
    assert "add_safe_globals" not in str(caught.value)  # torch's advice


@pytest.mark.parametrize("content", [[torch.ones(2)], {"model": {"a": torch.ones(2)}}, {3: torch.ones(2)}, {"a": 1}])
def test_a_pickle_of_something_else(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, WeightError, str(tmp_path / "pytorch_model.bin"), "holds")


def test_missing_unexpected_misshapen_and_integer_tensors_are_listed_together(tmp_path: Path) -> None:
    shape = tuple(saved("llama", tmp_path).get_parameter(UP).shape)
    less = (shape[0] - 1, shape[1])
    norm, gate = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"

    def change(name: str, how: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        file = shard_of(tmp_path, name)
        save_file(how(load_file(file)), file)
        return file

    (index,) = tmp_path.glob("*.index.json")
    content = json.loads(index.read_text())
    first = change(gate, lambda held: held | {gate: held[gate][:-1].clone()})
    last = change(norm, lambda held: held | {norm: held[norm].to(torch.int8), "model.extra": torch.ones(3)})
    change(UP, lambda held: {n: t for n, t in held.items() if n != UP} or {"another": torch.ones(1)})
    del content["weight_map"][UP]
    index.write_text(json.dumps(content))
    parts = [
        "4 problems",
        f"missing: {UP}",
        f"unexpected: model.extra ({last})",
        f"{norm} ({last}) is int8, which cannot be cast to the model's float32",
        f"{gate} ({first}) is {less}, the model's is {shape} (config: intermediate_size={shape[0]})",
    ]
    refused(tmp_path, WeightError, *parts)


def test_every_shape_that_the_config_contradicts_is_listed(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    parts = ["11 problems", "vocab_size=70", "intermediate_size=44", UP, "lm_head.weight", "model.embed_tokens.weight"]
    refused(tmp_path, WeightError, *parts, vocab_size=70, intermediate_size=44)


def test_layers_too_many_and_too_few(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    refused(tmp_path, WeightError, "unexpected: model.layers.2.mlp.up_proj.weight", num_hidden_layers=2)
    refused(tmp_path, WeightError, "missing: model.layers.3.mlp.up_proj.weight", num_hidden_layers=4)


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    refused(tmp_path, WeightError, f"missing: {UP}", "unexpected: transformer.h.0.attn.c_attn.weight")


def test_a_head_that_the_checkpoint_lacks() -> None:
    state = build(TINY["llama"]).state_dict()
    del state["lm_head.weight"]
    refused(state, WeightError, "missing: lm_head.weight")


def test_tied_tensors_that_differ() -> None:
    state = {n: t.clone() for n, t in build(TINY["gpt2"]).state_dict().items()}
    state["lm_head.weight"][3, 4] += 1
    refused(state, WeightError, "lm_head.weight", "transformer.wte.weight", "one tensor in the model", name="gpt2")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes_that_cannot_be_cast(dtype: torch.dtype) -> None:
    state = build(TINY["llama"]).state_dict()
    state[UP] = torch.zeros(state[UP].shape, dtype=dtype)
    refused(state, WeightError, UP, str(dtype).removeprefix("torch."), "cannot be cast")


def test_weights_that_are_not_finite_leave_a_meta_model_empty(tmp_path: Path) -> None:
    model = build(TINY["llama"])
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    target = empty(model).train()
    before = tensors(target)
    with pytest.raises(WeightError, match=f"NaN or infinite weights in {UP}"):
        hasten.init_inference(target, checkpoint=model.state_dict())
    assert all(tensors(target)[n] is t for n, t in before.items()) and target.training


@pytest.mark.parametrize("settings", [{"certify": {"factor": -1}}, {"batch_invariant": True, "device": "cpu"}])
def test_whatever_fails_later_leaves_a_meta_model_empty(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(TINY["bert"])
    target = empty(model)
    before = tensors(target)
    with pytest.raises(HastenError):
        hasten.init_inference(target, checkpoint=model.state_dict(), **settings)
    assert all(tensors(target)[n] is t for n, t in before.items())


def test_a_live_model_that_is_refused_keeps_its_values() -> None:
    model, target = build(TINY["llama"]), other("llama")
    target.config.hidden_act = "unheard-of"
    before = {n: t.clone() for n, t in tensors(target).items()}
    with pytest.raises(HastenError):
        hasten.init_inference(target, checkpoint=model.state_dict())
    assert_same(tensors(target), before)


def test_a_disk_that_fails_while_a_meta_model_is_filled_leaves_it_empty() -> None:
    class Failing(StateDict):
        def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
            if name == UP:
                raise WeightError(f"{self.origin}: {name} cannot be read")
            return self.tensors[name]

    model = build(TINY["llama"])
    target = empty(model)
    before = tensors(target)
    with pytest.raises(WeightError, match=f"disk: {UP}"):
        hasten.init_inference(target, checkpoint=Failing(model.state_dict(), "disk"))
    assert all(tensors(target)[n] is t for n, t in before.items())


def test_a_file_that_shrinks_after_it_was_checked_is_named(tmp_path: Path) -> None:
    from hasten.checkpoints import open_checkpoint

    saved("llama", tmp_path)
    source = open_checkpoint(tmp_path)
    file = shard_of(tmp_path, UP)
    file.write_bytes(b"")
    with pytest.raises(WeightError, match=f"{file} is no whole safetensors file"):
        source.read(UP)


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, ConfigError, f"{tmp_path} is empty", "model.safetensors")


def test_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, ConfigError, f"{tmp_path} holds only config.json", "model.safetensors")


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", ConfigError, f"{tmp_path}/nowhere does not exist")
    refused("owner/model", ConfigError, "owner/model does not exist")


@pytest.mark.parametrize("where", [3, ["a.bin"], {}, {"a": 1}, {3: torch.ones(2)}], ids=str)
def test_what_is_no_checkpoint_at_all(where: Any) -> None:
    refused(where, ConfigError, "checkpoint", "expected a folder")


@pytest.mark.parametrize(
    ("file", "format"),
    [
        ("tf_model.h5", "TensorFlow"),
    ],
)
def test_formats_that_arrive_later_are_named(file: str, format: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    refused(tmp_path, ConfigError, str(tmp_path), format, "not supported by this version")


def test_a_meta_model_without_a_checkpoint_hears_of_it() -> None:
    with pytest.raises(WeightError, match=r"on the meta device.*checkpoint=FOLDER fills them"):
        hasten.init_inference(empty(build(TINY["llama"])))
