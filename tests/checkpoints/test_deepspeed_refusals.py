"""Damaged, incomplete, mixed and hostile checkpoints of DeepSpeed: all that is wrong in one error, nothing changed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.checkpoints import open_checkpoint
from hasten.errors import WeightError
from tests.checkpoints.deepspeed_files import write
from tests.checkpoints.saved import empty, tensors
from tests.checkpoints.test_deepspeed import PATTERNS, masters
from tests.tiny import TINY, build


def refused(folder: Path, *parts: str) -> str:
    """Opening fails with all parts in the message."""
    with pytest.raises(WeightError) as caught:
        open_checkpoint(folder)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def change(path: Path, how: Callable[[dict[str, Any]], Any], key: str | None = None) -> Path:
    """Apply `how` to what a file of plain values holds, and write it again."""
    content = torch.load(path, weights_only=True)
    how(content if key is None else content[key])
    torch.save(content, path)
    return path


def plain(inside: Path, rank: int, **kept: Any) -> Path:
    """An optimizer's file of what is given."""
    path = inside / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": kept}, path)
    return path


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_missing_ranks_and_damaged_files_are_told_together(stage: int, tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], stage, 12)
    optimizer = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    for rank in (3, 11):
        (inside / optimizer.format(rank)).unlink()
    cut = inside / optimizer.format(10)
    cut.write_bytes(cut.read_bytes()[:-100])
    refused(tmp_path, "3 problems", "data-parallel rank 3 of 12", "rank 11 of 12", f"{cut} is damaged")


def test_model_states_of_zero_3_are_needed_of_every_rank(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 3, 3)
    (inside / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    refused(tmp_path, "no model states of data-parallel rank 1")


def test_zero_3_without_the_optimizers_files(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 3, 2)
    for f in inside.glob("*optim*"):
        f.unlink()
    refused(tmp_path, "ZeRO 3", "whose weights lie in the optimizer's files")


def test_no_model_states(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 1, 2)
    (inside / "mp_rank_00_model_states.pt").unlink()
    refused(tmp_path, f"{inside} holds no model states")


@pytest.mark.parametrize("stage", [1, 3])
def test_partitions_of_another_model(stage: int, tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], stage, 2)
    for f in inside.glob("*model_states*"):
        change(f, lambda content: content["param_shapes"][0].update(p0=torch.Size((5, 9))))
    refused(tmp_path, "elements")


def test_masters_of_other_shapes_than_the_module(tmp_path: Path) -> None:
    live = {n: t.bfloat16() for n, t in masters().items()} | {"p0": torch.ones(7, 5)}
    write(tmp_path, [masters()], 2, 2, module=live)
    refused(tmp_path, "p0 is (7, 5) in", "its master (5, 7)")


def test_partitions_that_are_too_short_by_what_padding_could_be(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 1, 1)
    plain(
        inside,
        0,
        single_partition_of_fp32_groups=[torch.ones(sum(t.numel() for t in masters().values()) - 1)],
        partition_count=[1],
    )
    refused(tmp_path, "not of one checkpoint")


def test_partitions_of_other_ranks_groups_and_versions(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 2, 3)
    one = plain(inside, 1, single_partition_of_fp32_groups=[torch.ones(4)], partition_count=[4], ds_version="0.19.8")
    two = plain(inside, 2, fp32_flat_groups=[torch.ones(4), torch.ones(1)], partition_count=3, ds_version="0.9")
    refused(
        tmp_path,
        f"{one} is of ranks 4",
        f"{two} is of ZeRO stage 3",
        f"{two} is of ds_version 0.9",
        f"{two} is of groups 2",
    )


def test_partitions_of_other_stages(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 1, 2)
    late = inside / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    late.write_bytes((write(tmp_path / "other", [masters()], 2, 2) / late.name).read_bytes())
    refused(tmp_path, f"{late} is of ZeRO stage 2", "of ZeRO stage 1")


def test_model_states_of_other_steps(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 3, 2)
    late = change(inside / "zero_pp_rank_1_mp_rank_00_model_states.pt", lambda content: content.update(global_steps=9))
    refused(tmp_path, f"{late} is of global_steps 9", "of global_steps 7")


def test_two_files_of_one_rank(tmp_path: Path) -> None:
    write(tmp_path, [masters()], 1, 2)
    write(tmp_path, [masters()], 1, 2, prefix="")
    refused(tmp_path, "2 problems", "are of one and the same rank")


@pytest.mark.parametrize("tag", ["global_step8", "../elsewhere", "", ".."])
def test_a_tag_that_is_not_there(tag: str, tmp_path: Path) -> None:
    write(tmp_path, [masters()], 0)
    (tmp_path / "latest").write_text(tag)
    refused(tmp_path, f"{tmp_path / 'latest'} says")


def test_the_only_tag_needs_no_name_and_several_do(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 1, 2)
    (tmp_path / "latest").unlink()
    assert open_checkpoint(tmp_path).entries.keys() == masters().keys()
    inside.rename(tmp_path / "global_step3")
    write(tmp_path, [masters()], 0)
    (tmp_path / "latest").unlink()
    refused(tmp_path, "no file latest", "2 tags", "global_step3", inside.name)


def test_parameters_that_are_nowhere(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 3, 2)
    for f in inside.glob("*model_states*"):
        change(f, lambda content: content["module"].update(lost=torch.empty(0)))
    refused(tmp_path, "has no value of lost")


def test_frozen_fragments_that_are_too_short(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 3, 2, frozen={"f": torch.ones(5)})
    change(inside / "zero_pp_rank_1_mp_rank_00_model_states.pt", lambda c: c.update(frozen_param_fragments={}))
    refused(tmp_path, "f (", "was frozen")


def test_files_of_something_else(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 1, 2)
    path = plain(inside, 0, exp_avg=[torch.ones(3)])
    refused(tmp_path, f"{path} holds no partition of ZeRO's")
    torch.save({"weights": 1}, inside / "mp_rank_00_model_states.pt")
    refused(tmp_path, "mp_rank_00_model_states.pt holds no model states: it has weights")


@pytest.mark.parametrize("said", [0, "two", None, [], [1.5]])
def test_counts_that_are_none(said: Any, tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 1, 1)
    plain(inside, 0, single_partition_of_fp32_groups=[torch.ones(3)], partition_count=said)
    refused(tmp_path, "partition_count")


def test_tensor_parallel_ranks_that_are_missing_or_hold_other_tensors(tmp_path: Path) -> None:
    for mp in (0, 2):
        write(tmp_path, [masters()], 1, 2, mp=mp, mp_ranks=3, universal_checkpoint_info=PATTERNS)
    refused(tmp_path, "no model states of tensor-parallel rank 1")
    write(tmp_path, [masters() | {"p9": torch.ones(2)}], 1, 2, mp=1, mp_ranks=3)
    refused(tmp_path, "p9 (", "is not on all 3 tensor-parallel ranks")


def test_shares_that_do_not_go_together(tmp_path: Path) -> None:
    for mp, size in enumerate((3, 4)):
        own = {"down": torch.ones(size, 2)}
        write(tmp_path, [own], 1, 2, mp=mp, mp_ranks=2, universal_checkpoint_info=PATTERNS)
    refused(tmp_path, "down", "do not go together")


def test_layers_and_experts_that_are_missing(tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 0)
    for e in (0, 2):
        torch.save({f"e{e}": torch.ones(1)}, inside / f"layer_1_expert_{e}_mp_rank_00_model_states.pt")
    refused(tmp_path, "no file of expert 1, layer 1")
    for layer, mp in ((0, 0), (0, 1), (1, 1)):
        torch.save({"w": torch.ones(1)}, inside / f"layer_{layer:02d}-model_{mp:02d}-model_states.pt")
    refused(tmp_path, "no file of layer 1, tensor-parallel rank 0")


@pytest.mark.parametrize(
    "said",
    [
        {"param_shapes": [{"p0": 5}]},
        {"param_shapes": [["p0"]]},
        {"param_shapes": [{"p0": torch.Size([-5, 7])}]},
        {"shared_params": 3},
        {"buffer_names": 4},
        {"module": {3: torch.ones(1)}},
        {"module": {"a": {"b": "c"}, "d": 3}},
        {"module": torch.ones(2)},
        {"frozen_param_fragments": {"f": "g"}},
    ],
    ids=str,
)
def test_model_states_of_another_shape(said: dict[str, Any], tmp_path: Path) -> None:
    inside = write(tmp_path, [masters()], 2, 2)
    path = change(inside / "mp_rank_00_model_states.pt", lambda content: content.update(said))
    refused(tmp_path, str(path))


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("file", ["bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_a_file_that_runs_code_does_not_run(file: str, tmp_path: Path) -> None:
    inside, mark = write(tmp_path, [masters()], 2, 2), tmp_path / "ran"
    content = torch.load(inside / "mp_rank_00_model_states.pt", weights_only=True)
    torch.save(content | {"optimizer_state_dict": {}, "client": Hostile(mark)}, inside / file)
    refused(tmp_path, f"{inside / file} is refused", "posix.system")
    assert not mark.exists()
    torch.load(inside / file, weights_only=False)  # what it would have done
    assert mark.exists()


def test_a_checkpoint_of_another_architecture_names_everything(tmp_path: Path) -> None:
    model = build(TINY["gpt2"])
    inside = write(tmp_path, [{n: p.detach() for n, p in model.named_parameters()}], 3, 2)
    target = empty(build(TINY["llama"]))
    before = tensors(target)
    with pytest.raises(WeightError) as caught:
        hasten.init_inference(target, checkpoint=tmp_path)
    said = str(caught.value)
    assert "missing: model.layers.0.mlp.up_proj.weight" in said
    assert re.search(rf"unexpected: transformer.h.0.attn.c_attn.weight \({re.escape(str(inside))}/\S+\.pt\)", said)
    assert all(tensors(target)[n] is t for n, t in before.items())
