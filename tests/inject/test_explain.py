"""explain() tells which ops serve, how generate() was answered, and how decode steps run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hasten
from hasten.inject.native import Unrecorded
from hasten.runtime import Generator, Sampling
from tests.tiny import TINY, build

IDS = torch.tensor([[9, 8, 40, 4, 33], [5, 6, 7, 21, 17]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}


def test_explain_counts_both_ways_and_says_how_steps_run() -> None:
    engine = hasten.init_inference(build(TINY["llama"]))
    assert "nothing has been generated natively yet" in str(engine.explain())
    engine.generate(IDS, **GREEDY)
    engine.generate(IDS, **GREEDY, num_beams=2)
    report = engine.explain()
    assert report.generate is not None
    assert (report.generate.native, report.generate.loops) == (1, (("beams", 1),))
    text = str(report)
    assert "generate: 1 native, 1 by transformers' loop (beams)" in text
    assert "decode steps run launch by launch" in text
    for ops in (report.backbones[0].one_token, report.backbones[0].many_tokens):
        assert [o.split()[0] for o in ops] == ["linear", "norm", "qkv", "attend_pages", "project", "up", "head"]
    assert hasten.init_inference(build(TINY["bert"])).explain().generate is None
    assert hasten.init_inference(build(TINY["t5"])).explain().generate is None
    reference = hasten.init_inference(build(TINY["llama"]), backend="reference").explain()
    assert "attend_pages reference" in reference.backbones[0].one_token


def test_steps_that_the_user_wants_unrecorded_run_launch_by_launch() -> None:
    theirs, engine = build(TINY["llama"]), hasten.init_inference(build(TINY["llama"]))
    with Generator(engine.backbones[0].transformer, recorder=Unrecorded()) as g:
        got = g.generate(IDS.tolist(), Sampling(9))
        assert torch.equal(
            torch.tensor([x.tokens for x in got]), theirs.generate(IDS, **GREEDY, min_new_tokens=9)[:, 5:]
        )
        assert "enable_cuda_graph=False" in g.decoding
    for given, graphs in ((None, True), (True, True), (False, False)):
        chosen = hasten.init_inference(build(TINY["llama"]), enable_cuda_graph=given)
        assert chosen.generating is not None
        assert chosen.generating.native.graphs == graphs
        assert (chosen.backbones[0].graphs is not None) == graphs


@pytest.mark.parametrize("name", TINY)
def test_every_family_can_be_explained(name: str) -> None:
    report = hasten.init_inference(build(TINY[name])).explain()
    assert all(any(o.startswith("qkv ") for o in b.many_tokens) for b in report.backbones)
