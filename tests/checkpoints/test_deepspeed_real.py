"""Folders that DeepSpeed itself wrote, where it is installed: every stage comes out as it was trained."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hasten
from tests.parallel.ranks import free_port

TRAIN = Path(__file__).with_name("deepspeed_train.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

CASES: list[tuple[int, str, int, dict[str, Any]]] = [
    (0, "fp32", 1, {}),
    (1, "fp32", 2, {}),
    (1, "bf16", 3, {}),
    (2, "fp32", 2, {"round_robin_gradients": True}),
    (2, "fp32", 3, {"parameter_alignment": True}),
    (3, "fp32", 2, {"stage3_param_persistence_threshold": 30}),
    (3, "bf16", 3, {"sub_group_size": 500}),
]


def train(folder: Path, stage: int, dtype: str, ranks: int, more: dict[str, Any]) -> None:
    command = [sys.executable, "-W", "ignore", str(TRAIN), str(folder), str(stage), dtype, json.dumps(more)]
    alike = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            command,
            env=os.environ | alike | {"RANK": str(r), "LOCAL_RANK": str(r), "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(ranks)
    ]
    try:
        said = [p.communicate(timeout=120)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    assert all(p.returncode == 0 for p in started), "\n".join(s[-3000:] for s in said)


@pytest.mark.parametrize(("stage", "dtype", "ranks", "more"), CASES)
def test_a_trained_model_comes_out_as_its_masters(
    stage: int, dtype: str, ranks: int, more: dict[str, Any], tmp_path: Path
) -> None:
    train(tmp_path, stage, dtype, ranks, more)
    trained = torch.load(tmp_path / "trained.pt")
    config = GPT2Config(vocab_size=61, n_positions=19, n_embd=20, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config).float().eval()
    engine = hasten.init_inference(model, checkpoint=tmp_path, dtype=torch.float32)
    filled = dict(model.named_parameters())
    assert filled.keys() == trained["weights"].keys()
    assert [n for n, t in trained["weights"].items() if not torch.equal(filled[n].to(t.dtype), t)] == []
    assert [n for n, t in trained["masters"].items() if not torch.equal(filled[n], t)] == []
    assert bool(trained["masters"]) == (stage > 0 and "round_robin_gradients" not in more)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.load_state_dict({n: t.float() for n, t in (trained["weights"] | trained["masters"]).items()}, strict=False)
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        difference = (engine(input_ids=ids).logits - theirs(input_ids=ids).logits).abs().max()
    assert difference < 1e-4
