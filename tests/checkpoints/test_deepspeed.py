"""What DeepSpeed's training engine saved comes out as it was trained: every stage, any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.checkpoints import open_checkpoint
from tests.checkpoints.deepspeed_files import write
from tests.checkpoints.saved import assert_same, empty, other, tensors
from tests.tiny import TINY, build

SHAPES = [(5, 7), (15,), (), (3, 1), (9,), (4, 2, 3), (1,)]


def masters(first: int = 0, shapes: Any = SHAPES) -> dict[str, Tensor]:
    torch.manual_seed(first)
    return {f"p{first + i}": torch.randn(s) for i, s in enumerate(shapes)}


def came_out(folder: Path, expected: dict[str, Tensor]) -> None:
    """Names, shapes and dtypes without reading, whole tensors, and slices of them."""
    source = open_checkpoint(folder)
    assert source.entries.keys() == expected.keys()
    for name, t in expected.items():
        assert (source.entries[name].shape, source.entries[name].dtype) == (tuple(t.shape), t.dtype), name
        assert torch.equal(source.read(name), t), name
        if t.dim():
            cut = (slice(1, 3), *(slice(0, 2) for _ in t.shape[1:]))
            assert torch.equal(source.read(name, cut), t[cut]), name


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_of_any_number_of_ranks(stage: int, ranks: int, tmp_path: Path) -> None:
    groups = [masters(), masters(20, [(2, 3), (1,)])]
    inside = write(tmp_path, groups, stage, ranks)
    came_out(tmp_path, groups[0] | groups[1])
    came_out(inside, groups[0] | groups[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_zero_the_module_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path, [masters()], 0, dtype=dtype)
    came_out(tmp_path, {n: t.to(dtype) for n, t in masters().items()})


@pytest.mark.parametrize("unit", [4, 8])
def test_parameters_that_are_aligned(unit: int, tmp_path: Path) -> None:
    write(tmp_path, [masters()], 2, 3, unit=unit)
    came_out(tmp_path, masters())


@pytest.mark.parametrize("size", [1, 7, 16])
def test_parameters_across_sub_groups(size: int, tmp_path: Path) -> None:
    write(tmp_path, [masters()], 3, 2, sub_group=size)
    came_out(tmp_path, masters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_shared_and_buffers(stage: int, tmp_path: Path) -> None:
    frozen = {"f": torch.randn(3, 3).bfloat16(), "g": torch.randn(1).bfloat16()}
    buffers = {"b": torch.arange(5), "c": torch.tensor(3.0)}
    write(tmp_path, [masters()], stage, 2, frozen=frozen, buffers=buffers, shared={"alias": "p0"})
    came_out(tmp_path, masters() | frozen | buffers | {"alias": masters()["p0"]})


def test_tied_tensors_that_nothing_is_said_of_come_from_one_place(tmp_path: Path) -> None:
    live = {n: t.bfloat16() for n, t in masters().items()}
    write(tmp_path, [masters()], 1, 2, module=live | {"alias": live["p0"]})
    came_out(tmp_path, masters() | {"alias": masters()["p0"]})


def test_what_is_said_to_be_shared_goes_before_copies_in_the_module(tmp_path: Path) -> None:
    live = {n: t.bfloat16() for n, t in masters().items()}
    write(tmp_path, [masters()], 1, 2, module=live | {"alias": live["p0"].clone()}, shared={"alias": "p0"})
    came_out(tmp_path, masters() | {"alias": masters()["p0"]})


@pytest.mark.parametrize("stage", [2, 3])
def test_files_of_more_ranks_left_by_an_earlier_run(stage: int, tmp_path: Path) -> None:
    write(tmp_path, [masters(40)], stage, 4, global_samples=3)
    write(tmp_path, [masters()], stage, 2)
    came_out(tmp_path, masters())


def test_without_the_optimizers_files_the_module_is_read(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 2, 2)
    for f in inside.glob("*optim*"):
        f.unlink()
    came_out(tmp_path, {n: t.bfloat16() for n, t in masters().items()})


def test_padding_that_was_kept_and_a_stage_that_is_not_told(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 1, 3)
    flat = torch.cat([t.flatten() for t in masters().values()])
    padding = -len(flat) % 6
    assert padding
    for r, part in enumerate(torch.cat([flat, torch.full((padding,), torch.nan)]).chunk(3)):
        kept = {"single_partition_of_fp32_groups": [part.clone()], "partition_count": [3]}
        torch.save({"optimizer_state_dict": kept}, inside / f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt")
    came_out(tmp_path, masters())


def test_old_names_of_files(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 1, 2, prefix="")
    for f in list(inside.glob("*_optim_states.pt")):
        f.rename(f.with_name(f.name.replace("_optim_states", "optim_states")))
    came_out(tmp_path, masters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_model_is_filled_from_the_folder_alone(name: str, stage: int, tmp_path: Path) -> None:
    model = build(TINY[name])
    trained = {n: p.detach() for n, p in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    shared = {
        n: next(m for m, q in trained.items() if q.data_ptr() == p.data_ptr())
        for n, p in every.items()
        if n not in trained
    }
    buffers = {n: t for n, t in model.state_dict().items() if n not in every}
    write(tmp_path, [trained], stage, 3, shared=shared, buffers=buffers)
    for target in (empty(model), other(name)):
        engine = hasten.init_inference(target, checkpoint=tmp_path, replace_with_kernel_inject=False)
        assert_same(tensors(target), tensors(model))
        assert any(str(tmp_path) in note for note in engine.notes)


def test_layers_of_a_pipeline(tmp_path: Path) -> None:
    inside = write(tmp_path, [{}], 0, module={})
    torch.save({"module": None, "global_steps": 7}, inside / "mp_rank_00_model_states.pt")
    expected = {}
    for i in (1, 2, 10):
        layer = masters(i)
        torch.save(layer, inside / f"layer_{i:02d}-model_00-model_states.pt")
        expected |= {f"{i}.{n}": t for n, t in layer.items()}
    came_out(tmp_path, expected)


def test_experts_have_files_of_their_own(tmp_path: Path) -> None:
    name = "moe.deepspeed_moe.experts.deepspeed_experts.{}.w"
    live = {n: t.bfloat16() for n, t in masters().items()}
    inside = write(tmp_path, [masters()], 2, 2, module=live)
    experts = {name.format(e): torch.randn(3, 2) for e in range(11)}
    for e, (n, t) in enumerate(experts.items()):
        torch.save({n: t}, inside / f"layer_0_expert_{e}_mp_rank_00_model_states.pt")
    came_out(tmp_path, live | experts)


PATTERNS = {
    "tp_replicated_parameter_patterns": [r"norm"],
    "parameter_with_row_parallelism_patterns": [r"down"],
    "parameter_with_2_sub_params_cat_dim_0": [r"up"],
    "vocabulary_parameter_patterns": [r"words"],
    "original_vocab_size": 11,
}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_tensor_parallel_ranks_are_joined_as_the_patterns_say(stage: int, tmp_path: Path) -> None:
    whole = {"norm": torch.randn(6), "down": torch.randn(3, 8), "up": torch.randn(8, 3), "words": torch.randn(12, 2)}
    gate, up = whole["up"].chunk(2)
    for mp in range(2):
        own = {
            "norm": whole["norm"],
            "down": whole["down"].chunk(2, 1)[mp],
            "up": torch.cat([gate.chunk(2)[mp], up.chunk(2)[mp]]),
            "words": whole["words"].chunk(2)[mp],
        }
        own = {n: t.contiguous() for n, t in own.items()}
        write(tmp_path, [own], stage, 3, mp=mp, mp_ranks=2, dtype=torch.float32, universal_checkpoint_info=PATTERNS)
    came_out(tmp_path, whole | {"words": whole["words"][:11]})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_without_patterns_tensor_parallel_ranks_are_joined_by_what_the_model_says(stage: int, tmp_path: Path) -> None:
    model = build(TINY["llama"])
    for mp in range(2):
        own = {}
        for n, t in model.state_dict().items():
            axis = 1 if "o_proj" in n or "down_proj" in n else 0 if "_proj" in n else None
            own[n] = t if axis is None else t.chunk(2, axis)[mp].clone()
        write(tmp_path, [own], stage, 3, mp=mp, mp_ranks=2, dtype=torch.float32)
    target = empty(model)
    hasten.init_inference(target, checkpoint=tmp_path, replace_with_kernel_inject=False)
    assert_same(tensors(target), tensors(model))


@pytest.mark.parametrize("flat", [False, True])
def test_universal_checkpoints(flat: bool, tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 1, 2, frozen={"f": torch.ones(2)}, shared={"alias": "p0"})
    for f in inside.glob("*optim*"):
        f.unlink()
    for n, t in (masters() | {"alias": masters()["p0"].bfloat16().float()}).items():
        (inside / "zero" / n).mkdir(parents=True)
        torch.save({"param": t.flatten() if flat else t}, inside / "zero" / n / "fp32.pt")
        torch.save({"param": t + 1}, inside / "zero" / n / "exp_avg.pt")
    came_out(tmp_path, masters() | {"f": torch.ones(2), "alias": masters()["p0"]})
