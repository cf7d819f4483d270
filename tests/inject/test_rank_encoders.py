"""Encoders that ranks divide are recorded by each rank, and one that cannot record leaves nobody waiting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers as T

import hasten
from hasten.inject import captured
from hasten.inject.captured import Compute, Graphs, Tensors
from tests.inject.test_captured import Recorder
from tests.parallel import ranks


def encoder(width: int = 48, layers: int = 3) -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 67}
    return T.BertModel(T.BertConfig(**sizes, intermediate_size=2 * width)).eval()


def unable(compute: Compute, inputs: Tensors, pool: Any) -> tuple[Callable[[], None], Tensors, Any]:
    compute(*inputs)  # as the stand-in of the other rank does, which has no other way to find its outputs
    raise RuntimeError("on purpose")


@torch.no_grad()
def recorded(fails: bool) -> tuple[bool, int, tuple[str, ...]]:
    """Whether all answers are right, how many calls were replayed, and why some were not."""
    theirs = encoder()
    engine = hasten.init_inference(copy.deepcopy(theirs), mp_size=dist.get_world_size())
    recorder, lane_of = Recorder(), captured.lane_of
    (b,) = engine.backbones
    b.graphs = Graphs(unable if fails and dist.get_rank() == 1 else recorder)
    captured.lane_of = lambda inputs: 0
    try:
        right = True
        for n in (7, 7, 5, 7, 7, 5):
            ids = torch.randint(67, (2, n))
            want = theirs(ids)
            for given in ({}, {"attention_mask": torch.tensor([[1] * n, [1] * (n - 2) + [0] * 2])}):
                got, want = engine(ids, **given)[0], theirs(ids, **given)[0]
                right &= torch.allclose(got[:, :-2], want[:, :-2], atol=1e-5)
    finally:
        captured.lane_of = lane_of
    return right, recorder.replays, b.graphs.refused


@torch.no_grad()
def recorded_on_gpus() -> tuple[bool, int, tuple[str, ...]]:
    """Whether all answers are right, how many calls are recorded, and why some are not."""
    theirs = encoder(256)
    engine = hasten.init_inference(copy.deepcopy(theirs), mp_size=dist.get_world_size(), dtype=torch.float16)
    right = True
    for n in (64, 64, 32, 64, 64, 32, 64):
        ids = torch.randint(67, (2, n))
        got, want = engine(ids.cuda())[0].float().cpu(), theirs(ids)[0]
        right &= float((got - want).abs().max()) < 2e-2 * float(want.abs().max())
    graphs = engine.backbones[0].graphs
    assert graphs is not None
    return right, graphs.recorded, graphs.refused


def test_calls_are_recorded_on_every_rank() -> None:
    for right, replays, refused in ranks.run(2, recorded, False):
        assert right and replays >= 4 and not refused


def test_a_rank_that_cannot_record_keeps_up() -> None:
    first, second = ranks.run(2, recorded, True)
    assert first[0] and first[1] >= 4 and not first[2]
    assert second == (True, 0, ("on purpose",))
