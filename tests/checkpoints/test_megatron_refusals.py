"""What is wrong with a Megatron checkpoint is told in one error, with files, and the model stays as it was."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import ConfigError, HastenError, WeightError
from tests.checkpoints.megatron_files import arguments, of_bert, of_gpt2, write
from tests.checkpoints.saved import assert_same, empty, tensors
from tests.checkpoints.test_megatron import HEADS, bert, described, gpt2
from tests.tiny import TINY
from tests.tiny.megatron import Era, GPTModel, build_megatron
from tests.tiny.model import build


def refused(where: Any, *parts: str, error: type[HastenError] = WeightError, model: Any = None, **more: Any) -> str:
    """`checkpoint=where` fails with all the parts in its message, and a model on meta and a live one stay."""
    like = model if model is not None else gpt2()
    message = ""
    for target in (empty(like), like):
        before = tensors(target)
        values = {n: t.clone() for n, t in before.items()}
        with pytest.raises(error) as caught:
            hasten.init_inference(target, checkpoint=where, **more)
        message = str(caught.value)
        for part in parts:
            assert part in message
        after = tensors(target)
        assert all(after[n] is t for n, t in before.items())
        if target is like:
            assert_same(after, values)
    return message


def written(folder: Path, **more: Any) -> Path:
    model = gpt2()
    return write(folder, of_gpt2(model), heads=HEADS, **more)


def file(inside: Path, rank: str) -> Path:
    return inside / f"mp_rank_{rank}" / "model_optim_rng.pt"


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=False)
    how(content)
    torch.save(content, path)


def test_a_missing_rank_and_a_missing_file(tmp_path: Path) -> None:
    inside = written(tmp_path, ranks=2, stages=2)
    file(inside, "01_000").unlink()
    refused(tmp_path, f"{file(inside, '01_000')}: there is no such file")
    file(inside, "01_000").parent.rmdir()
    refused(tmp_path, "there is no file of tensor-parallel rank 1")


def test_ranks_that_the_arguments_tell_of_and_nobody_has(tmp_path: Path) -> None:
    said = arguments(of_gpt2(gpt2()), HEADS, 4, 2)
    written(tmp_path, ranks=2, arguments=said)
    refused(
        tmp_path,
        "2 problems",
        "tensor_model_parallel_size=4, and there are files of 2",
        "pipeline_model_parallel_size=2",
    )


def test_counts_that_contradict_the_description(tmp_path: Path) -> None:
    inside = written(tmp_path, ranks=2)
    where = described(inside, mp_size=4)
    refused(where, "2 files", "mp_size=4", error=ConfigError)
    change(file(inside, "00"), lambda c: c.update(mp_world_size=3))
    refused(described(inside), "mp_world_size=3, and there are files of 2")


def test_mixed_versions_and_iterations_are_told_together(tmp_path: Path) -> None:
    inside = written(tmp_path, ranks=2)
    change(file(inside, "01"), lambda c: c.update(checkpoint_version=1.0, iteration=40))
    refused(tmp_path, "2 problems", "is of checkpoint_version 1.0", "is of iteration 40", str(file(inside, "01")))


def test_a_version_that_nobody_says_is_asked_for(tmp_path: Path) -> None:
    inside = written(tmp_path, ranks=2, version=0, says_version=False)
    refused(tmp_path, "has no checkpoint_version", '"version": 0')
    refused(described(inside), "has no checkpoint_version")
    hasten.init_inference(empty(gpt2()), checkpoint=described(inside, version=0))


def test_versions_that_do_not_exist(tmp_path: Path) -> None:
    inside = written(tmp_path, version=2)
    refused(described(inside, version=4.0), "checkpoint version 4.0 is not one of 0, 1, 2, 3")
    inside = written(tmp_path / "core", era="core", version=3)
    refused(described(inside, version=0.0), "version 0.0 is given", "Megatron-Core's names")


@pytest.mark.parametrize("keep", [0, 100, -1, -3000])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    inside = written(tmp_path, ranks=2)
    path = file(inside, "01")
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, str(path), "damaged")


class Hostile:
    def __init__(self, function: Callable[..., Any], argument: object) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> Any:
        return self.function, (self.argument,)


@pytest.mark.parametrize("function", [os.system, subprocess.check_call, eval], ids=lambda f: f.__name__)
@pytest.mark.parametrize("where", ["args", "model", "rng_state"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(where: str, function: Any, tmp_path: Path) -> None:
    inside = written(tmp_path, ranks=2)
    mark = tmp_path / "ran"
    argument: Any = {os.system: f"touch {mark}", subprocess.check_call: ["touch", str(mark)]}.get(
        function, f"open({str(mark)!r}, 'w').close()"
    )
    change(file(inside, "01"), lambda c: c.update({where: Hostile(function, argument)}))
    refused(tmp_path, str(file(inside, "01")), "refused", function.__name__)
    assert not mark.exists()
    function(argument)  # what it would have done
    assert mark.exists()


def test_another_architecture_lists_names_of_both(tmp_path: Path) -> None:
    written(tmp_path, ranks=2)
    refused(tmp_path, "missing: bert.embeddings.token_type_embeddings.weight", model=bert())
    write(tmp_path / "bert", of_bert(bert()), heads=HEADS, ranks=2)
    refused(tmp_path / "bert", "unexpected: embedding.tokentype_embeddings.weight")
    llama = build(TINY["llama"])
    refused(tmp_path, "unexpected: embedding.position_embeddings.weight", "the model needs (48, 48)", model=llama)


def test_sizes_that_differ_are_listed_by_entry_and_file(tmp_path: Path) -> None:
    inside = written(tmp_path, ranks=2)
    name = "layers.1.mlp.linear_fc1.weight"
    parts = [f"{name} ({file(inside, '00')}) is (40, 36), the model needs (48, 36)", "problems"]
    message = refused(tmp_path, *parts, model=gpt2(n_inner=48))
    assert "missing" not in message
    refused(tmp_path, "unexpected: layers.3.mlp.linear_fc2.bias", model=gpt2(n_layer=3))
    refused(tmp_path, "missing: transformer.h.4.mlp.c_fc.weight", model=gpt2(n_layer=5))


def test_only_padding_is_cut_off_a_vocabulary(tmp_path: Path) -> None:
    said = arguments(of_gpt2(gpt2()), HEADS, 2)
    written(tmp_path, ranks=2, arguments=said)  # 67 rows padded to 80
    hasten.init_inference(empty(gpt2(vocab_size=65)), checkpoint=tmp_path)
    refused(
        tmp_path, "embedding.word_embeddings.weight", "is (80, 36), the model needs (64, 36)", model=gpt2(vocab_size=64)
    )
    refused(tmp_path, "is (80, 36), the model needs (81, 36)", model=gpt2(vocab_size=81))


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ({"num_attention_heads": 6}, ["num_attention_heads 6", "the model has 4"]),
        ({"bias_gelu_fusion": False}, ["activation gelu", "gelu_tanh"]),
        ({"swiglu": True}, ["swiglu True"]),
        ({"normalization": "RMSNorm"}, ["normalization rms"]),
        ({"norm_epsilon": 1e-6}, ["norm_epsilon 1e-06"]),
        ({"position_embedding_type": "rope"}, ["position_embedding_type rope", "learned_absolute"]),
        ({"apply_layernorm_1p": True}, ["apply_layernorm_1p True"]),
        ({"num_layers": 9, "hidden_size": 8}, ["num_layers 9", "hidden_size 8"]),
    ],
    ids=str,
)
def test_arguments_that_contradict_the_model(said: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    written(tmp_path, ranks=2, arguments=arguments(of_gpt2(gpt2()), HEADS, 2, **said))
    refused(tmp_path, "the checkpoint was trained with", *parts)


def test_both_stacks_of_an_encoder_decoder(tmp_path: Path) -> None:
    inside = written(tmp_path)

    def add(content: dict[str, Any]) -> None:
        inner = content["model"]["language_model"]
        inner["decoder"] = {"layers.0.input_layernorm.weight": torch.ones(36)}

    change(file(inside, "00"), add)
    refused(tmp_path, "two stacks of layers", "layers.0.input_layernorm.weight")


def test_both_containers_need_a_key(tmp_path: Path) -> None:
    inside = written(tmp_path)
    change(file(inside, "00"), lambda c: c.update(module=c["model"]))
    refused(tmp_path, "has both model and module", "module_key")
    hasten.init_inference(empty(gpt2()), checkpoint=described(inside, module_key="module"))


def test_tensors_that_one_rank_lacks_or_has_otherwise(tmp_path: Path) -> None:
    inside = written(tmp_path, ranks=2)

    def shrink(content: dict[str, Any]) -> None:
        layers = content["model"]["language_model"]["encoder"]
        del layers["layers.1.mlp.dense_h_to_4h.bias"]
        layers["layers.2.self_attention.dense.weight"] = torch.ones(35, 18)

    change(file(inside, "01"), shrink)
    refused(tmp_path, "2 problems", "has no layers.1.mlp.linear_fc1.bias", "(36, 18) in", "(35, 18) in")


def test_a_tracker_that_leads_nowhere(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("31")
    refused(tmp_path, "says 31", "iter_0000031 does not exist", "iter_0000030")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../..")
    refused(tmp_path, "expected a number or 'release'")


def test_a_live_module_without_a_policy_is_asked_for_one(tmp_path: Path) -> None:
    written(tmp_path)
    model = build_megatron(GPTModel, Era())
    with pytest.raises(HastenError, match="injection_policy"):
        hasten.init_inference(model, checkpoint=tmp_path, replace_with_kernel_inject=False)


@pytest.mark.parametrize(
    ("description", "parts"),
    [
        ({"type": "Megatron"}, ["'checkpoints' is missing"]),
        ({"checkpoints": ["a.pt"]}, ["'type' is missing"]),
        ({"type": "megatrn", "checkpoints": ["a.pt"]}, ["'megatrn' is not one of"]),
        ({"type": "Megatron", "checkpoints": ["a.pt"], "mpsize": 2}, ["unknown key 'mpsize'", "'mp_size'"]),
        ({"type": "Megatron", "checkpoints": [], "mp_size": 0}, ["2 problems", "mp_size=0", "lists no files"]),
        ({"type": "Megatron", "checkpoints": [3], "version": "x"}, ["2 problems", "must list names", "version='x'"]),
        ({"type": "Megatron", "checkpoints": {"tp": ["a"]}}, ['parallelization="tp"']),
        ({"type": "Megatron", "checkpoints": ["a.pt"], "parallelization": "ep"}, ["parallelization='ep'"]),
    ],
    ids=str,
)
def test_descriptions_that_are_wrong(description: dict[str, Any], parts: list[str]) -> None:
    refused(description, *parts, error=ConfigError)


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_files_that_are_no_description(text: str, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(text)
    refused(tmp_path / "test.json", str(tmp_path / "test.json"), error=ConfigError)


def test_a_listed_file_that_does_not_exist(tmp_path: Path) -> None:
    refused(
        {"type": "Megatron", "checkpoints": ["a.pt", "b.pt"], "base_dir": str(tmp_path)},
        "2 problems",
        f"{tmp_path}/a.pt",
    )
