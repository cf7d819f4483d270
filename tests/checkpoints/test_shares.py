"""A model that ranks divide is filled share by share: each rank reads its own slices, and holds nothing besides."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hasten
from hasten.checkpoints import Source, StateDict, open_checkpoint
from hasten.checkpoints.copying import pieces
from hasten.errors import HastenError, WeightError
from hasten.inject.loan import divides
from hasten.module_inject.replace_policy import MegatronLayerPolicy
from hasten.weights import Param
from tests.checkpoints.megatron_files import of_gpt2, of_live, write
from tests.checkpoints.test_megatron import described, gpt2
from tests.parallel import ranks
from tests.tiny import TINY, build
from tests.tiny.megatron import Era, GPTModel, ParallelTransformerLayer, build_megatron

IDS = torch.tensor([[5, 9, 30, 2, 7]])


class Counted:
    """A Source that counts the numbers that are read of it."""

    def __init__(self, source: Source) -> None:
        self.source, self.origin, self.entries, self.read_of = source, source.origin, source.entries, dict[str, int]()

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        t = self.source.read(name, index)
        self.read_of[name] = self.read_of.get(name, 0) + t.numel()
        return t

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)  # what tells of a dialect


def made(name: str) -> Any:
    return gpt2() if name == "megatron" else build(TINY[name])


@torch.no_grad()
def filled(name: str, folder: Any, given: dict[str, Any]) -> tuple[float, bool, bool, int, int]:
    """How far the answer is off, whether state and reverted model are the saved ones, and numbers read and needed."""
    theirs, model = made(name), made(name).to("meta")
    for p in theirs.parameters():
        p.data = p.data.to(given.get("dtype"))
    source = Counted(open_checkpoint(folder))
    engine = hasten.init_inference(model, checkpoint=source, mp_size=dist.get_world_size(), **given)
    want = theirs(input_ids=IDS)[0]
    off = float((engine(input_ids=IDS.to(model.device))[0].cpu() - want).abs().max() / want.abs().max())
    (b,) = engine.backbones
    apart = [one for one in b.bindings if divides(b.division, one)]
    kept = {k for one in apart for k in one.keys}
    before, state = theirs.state_dict(), engine.module.state_dict()
    needed = sum(_unpadded(one.param, b.transformer.weights[one.param.name]).numel() for one in apart)
    tied = {id(p) for n, p in theirs.named_parameters() if n not in kept}
    needed += sum(p.numel() for p in theirs.parameters() if id(p) in tied)
    same = before.keys() == state.keys() and all(torch.equal(before[k], state[k].cpu()) for k in before)
    engine.revert()
    reverted = model.to("cpu").state_dict()
    back = all(torch.equal(before[k], reverted[k]) for k in before) and torch.equal(model(input_ids=IDS)[0], want)
    return off, same, back, sum(source.read_of.values()), needed


def _unpadded(p: Param, own: Tensor) -> Tensor:
    return own[: p.shape[0] - dist.get_rank() * len(own)] if p.role == "vocab" else own


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", 0),
        ("phi3", 0),  # query, key and value in one stored tensor, gate and up in another
        ("bloom", 0),  # head by head
        ("opt", 0),
        ("megatron", 0),
        ("codegen", None),  # rows of query_key_value that no few slices hold
        ("qwen3_moe", None),  # experts that transformers stacks
    ],
)
def test_ranks_read_their_own_slices(name: str, more: int | None, tmp_path: Path) -> None:
    if name == "megatron":
        write(tmp_path, of_gpt2(gpt2()), heads=4, ranks=4, stages=2, chunks=1, version=2, era="encoder")
    else:
        made(name).save_pretrained(tmp_path)
    for off, same, back, read, needed in ranks.run(2, filled, name, str(tmp_path), {}):
        assert off < 3e-5
        assert same and back
        assert read > needed if more is None else read - needed == more


def test_shares_have_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path)
    for off, same, back, *_ in ranks.run(2, filled, "llama", str(tmp_path), {"dtype": torch.bfloat16}):
        assert off < 3e-2
        assert same and back


@torch.no_grad()
def tutorial(file: str) -> bool:
    """DeepSpeed's call for a live module of Megatron-LM and a description of its ranks' files."""
    theirs, model = build_megatron(GPTModel, Era()), build_megatron(GPTModel, Era())
    for p in model.parameters():
        p.mul_(-0.5)
    policy = {ParallelTransformerLayer: MegatronLayerPolicy}
    engine = hasten.init_inference(model, mp_size=dist.get_world_size(), checkpoint=file, injection_policy=policy)
    places, hidden = torch.arange(5)[None], torch.ones(5, 5).triu(1).bool()[None, None]
    return torch.allclose(engine(IDS, places, hidden), theirs(IDS, places, hidden), atol=3e-5)


def test_the_tutorials_megatron_merges_files_into_other_ranks(tmp_path: Path) -> None:
    content = of_live(build_megatron(GPTModel, Era()), 2, 3)
    inside = write(tmp_path, content, heads=3, ranks=1, stages=3, version=2, era="encoder")
    file = inside / "test.json"
    file.write_text(json.dumps(described(inside, version=2.0, pp_size=3)))
    assert ranks.run(3, tutorial, str(file)) == [True] * 3


def live(name: str, folder: str) -> bool:
    """A model with other values on every rank, filled and divided."""
    torch.manual_seed(dist.get_rank())
    model = build(TINY[name])
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    theirs = build(TINY[name])
    engine = hasten.init_inference(model, checkpoint=folder, mp_size=dist.get_world_size())
    state = engine.module.state_dict()
    return all(torch.equal(v, state[k]) for k, v in theirs.state_dict().items())


def test_a_live_model_takes_the_checkpoints_values(tmp_path: Path) -> None:
    build(TINY["llama"]).save_pretrained(tmp_path)
    assert ranks.run(2, live, "llama", str(tmp_path)) == [True, True]


def damaged(name: str, folder: str, how: str) -> tuple[str, bool]:
    """What is said where rank 1's checkpoint is not rank 0's, and whether the model is still empty."""
    state = {k: v.clone() for k, v in build(TINY[name]).state_dict().items()}
    key = "model.layers.1.mlp.down_proj.weight"
    if dist.get_rank() == 1 and how == "nan":
        state[key][-1, -1] = torch.nan
    if dist.get_rank() == 1 and how == "lacks":
        del state[key]
    model = made(name).to("meta")
    try:
        hasten.init_inference(model, checkpoint=StateDict(state), mp_size=2)
    except HastenError as error:
        return f"{type(error).__name__}: {error}", all(p.is_meta for p in model.parameters())
    return "accepted", False


@pytest.mark.parametrize(("how", "why"), [("nan", "NaN or infinite weights in"), ("lacks", "missing:")])
def test_what_is_wrong_with_one_ranks_files_is_said_on_all(how: str, why: str) -> None:
    for rank, (said, empty) in enumerate(ranks.run(2, damaged, "llama", "", how)):
        assert why in said and "model.layers.1.mlp.down_proj.weight" in said
        assert said.startswith(WeightError.__name__) if rank else "gave it up too. rank 1: WeightError" in said
        assert empty


def measured(folder: str) -> tuple[float, float]:
    """The peak of memory beyond a rank's share, and the share itself, in sizes of the largest tensor."""
    import transformers as T

    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once
    sys.setswitchinterval(0.0002)
    with torch.device("meta"):
        model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES)).eval()
    largest = 4 * max(p.numel() for p in model.parameters())
    before, peak, done = _anonymous(), 0, False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, _anonymous())
            time.sleep(0.0003)

    thread = threading.Thread(target=watch)
    thread.start()
    engine = hasten.init_inference(model, checkpoint=folder, mp_size=2)
    done = True
    thread.join()
    own = 4 * sum(t.numel() for t in engine.backbones[0].transformer.weights.values())
    return (peak - before - own) / largest, own / largest


SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 2048}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def _anonymous() -> int:
    with open("/proc/self/status") as f:
        return 1024 * int(next(line for line in f if line.startswith("RssAnon")).split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="this system does not tell a process's memory")
def test_the_peak_is_the_share_and_one_tensor(tmp_path: Path) -> None:
    import transformers as T

    T.LlamaForCausalLM(T.LlamaConfig(**SIZES)).save_pretrained(tmp_path, max_shard_size="20MB")
    warm = tmp_path / "warm"
    build(TINY["llama"]).save_pretrained(warm)
    ranks.run(2, live, "llama", str(warm))  # imports
    for more, share in ranks.run(2, measured, str(tmp_path)):
        assert share > 10 and more < 1.1


def test_pieces_cover_a_tensor_of_any_shape() -> None:
    for shape in ((), (1,), (7, 1, 5), (3, 40), (40, 3), (1, 100)):
        what, to = torch.randn(shape), torch.zeros(shape)
        for mine, theirs in pieces(to, what, 64):
            assert theirs.numel() <= 16
            mine.copy_(theirs)
        assert torch.equal(to, what)
