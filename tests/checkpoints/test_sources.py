"""Sources: names and shapes without reading, tensors and slices of them, by file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.checkpoints import Entry, StateDict, open_checkpoint
from tests.checkpoints.saved import SHARDED, WHOLE, saved


@pytest.mark.parametrize("size", [SHARDED, WHOLE])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_entries_and_slices_are_those_of_the_model(kind: str, size: str, tmp_path: Path) -> None:
    state = saved("llama", tmp_path, kind, size).state_dict()
    source = open_checkpoint(tmp_path)
    assert source.entries.keys() == state.keys() and source.origin == str(tmp_path)
    for name, t in state.items():
        entry = source.entries[name]
        assert (entry.shape, entry.dtype) == (tuple(t.shape), t.dtype) and Path(entry.file).parent == tmp_path
        assert torch.equal(source.read(name), t)
        cut = (slice(1, 3),) * t.ndim
        assert torch.equal(source.read(name, cut), t[cut])
    files = {e.file for e in source.entries.values()}
    assert (len(files) > 3) == (size == SHARDED)


@pytest.mark.parametrize("ending", ["safetensors", "bin", "pt"])
def test_one_file_of_any_name_with_scalars_and_other_dtypes(ending: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {"a": torch.tensor(3.0), "b": torch.ones(2, 0, dtype=torch.bfloat16), "c": torch.arange(4)}
    file = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    source = open_checkpoint(str(file))
    assert source.entries == {n: Entry(tuple(t.shape), t.dtype, str(file)) for n, t in state.items()}
    assert all(torch.equal(source.read(n), t) for n, t in state.items())


def test_a_state_dict_is_a_source() -> None:
    source = open_checkpoint({"a": torch.arange(6).reshape(2, 3)})
    assert source.entries == {"a": Entry((2, 3), torch.int64, "the state dict")}
    assert source.read("a", (slice(1, 2), slice(0, 2))).tolist() == [[3, 4]]


def test_a_source_of_the_users_own_is_taken_as_it_is() -> None:
    source = StateDict({"a": torch.ones(1)}, "mine")
    assert open_checkpoint(source) is source


def test_an_index_decides_where_two_shards_hold_a_tensor(tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    for n, file in enumerate(("x.safetensors", "y.safetensors")):
        save_file({"both": torch.full((2,), float(n)), f"own{n}": torch.ones(1)}, tmp_path / file)
    places = {"own0": "x.safetensors", "both": "y.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    source = open_checkpoint(tmp_path)
    assert source.read("both").tolist() == [1, 1]
    assert source.entries.keys() == {"both", "own0", "own1"}
