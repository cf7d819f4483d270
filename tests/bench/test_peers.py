"""What the other engines are asked for. Stand-ins note it: those engines are not here."""

from __future__ import annotations

import copy
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hasten.bench.engines import Compiled, Live, Stand, Transformers
from hasten.bench.peers import PEERS, DeepSpeed, GptFast, Vllm

PROMPTS = [[1, 2, 3], [4, 5, 6]]


@pytest.fixture
def stand() -> Stand:
    return Stand("tiny-llama", torch.float32, torch.device("cpu"))


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Something that can be imported under a name."""
    made = ModuleType(name)
    made.__dict__.update(members, __spec__=ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, name, made)


def test_transformers_makes_as_many_tokens_as_asked_for(stand: Stand) -> None:
    ids = Transformers(stand).generate(PROMPTS, [4, 4])
    assert ids.shape == (2, 7)
    assert ids[:, :3].tolist() == PROMPTS
    live = Live(stand)
    assert live.model is stand.engine.module
    assert torch.equal(live.generate(PROMPTS, [4, 4]), ids)


def test_compiled_transformers_uses_a_static_cache_and_graphs(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(stand.model, "generate", lambda ids, **how: asked.append(how))
    engine = Compiled(stand)
    engine.generate(PROMPTS, [4, 4])
    assert asked[0]["cache_implementation"] == "static"
    monkeypatch.setattr(torch, "compile", lambda model, **how: lambda **inputs: (model, how, inputs))
    assert engine.encode({"x": torch.ones(1)})[:2] == (stand.model, {"mode": "reduce-overhead"})
    assert engine.compiled is engine.compiled  # compiled once


def test_deepspeed_gets_a_copy_and_injects_kernels(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def init_inference(model: Any, **how: Any) -> Any:
        asked.append((model, how))
        return SimpleNamespace(module=copy.deepcopy(model))

    module(monkeypatch, "deepspeed", init_inference=init_inference)
    assert PEERS["deepspeed"].lacks == []
    engine = DeepSpeed(stand)
    ((model, how),) = asked
    assert model is not stand.model
    assert how == {"dtype": torch.float32, "replace_with_kernel_inject": True, "max_out_tokens": 64}
    assert torch.equal(engine.generate(PROMPTS, [4, 4]), Transformers(stand).generate(PROMPTS, [4, 4]))


def test_vllm_gets_the_shape_and_every_length(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Llm:
        def __init__(self, **how: Any) -> None:
            asked.update(how)

        def generate(self, prompts: Any, sampling: Any, use_tqdm: bool) -> Any:
            return prompts, sampling, use_tqdm

    module(monkeypatch, "vllm", LLM=Llm, SamplingParams=lambda **how: how)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    engine = Vllm(stand)
    config = json.loads((Path(asked["model"]) / "config.json").read_text())
    assert (config["architectures"], config["hidden_size"]) == (["LlamaForCausalLM"], 32)
    assert (asked["dtype"], asked["load_format"], asked["max_model_len"]) == ("float32", "dummy", 64)
    assert asked["gpu_memory_utilization"] == pytest.approx(0.85 * 0.75)
    prompts, sampling, _ = engine.generate(PROMPTS, [4, 7])
    assert prompts == [{"prompt_token_ids": p} for p in PROMPTS]
    assert [(s["max_tokens"], s["ignore_eos"], s["temperature"]) for s in sampling] == [(4, True, 0), (7, True, 0)]
    assert "model" not in vars(stand)  # it brings its own


def test_gpt_fast_gets_the_shape_and_one_sequence(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    class Transformer(torch.nn.Module):
        def __init__(self, shape: Any) -> None:
            super().__init__()
            self.shape, self.output = shape, torch.nn.Linear(1, 1)

        def setup_caches(self, **sizes: int) -> None:
            self.sizes = sizes

    def decode(model: Any, token: Any, at: Any, new: int, **how: Any) -> Any:
        return model, token.shape, at.tolist(), new

    monkeypatch.setattr(torch, "compile", lambda f, **how: (f, how))
    module(monkeypatch, "sentencepiece")
    module(monkeypatch, "model", ModelArgs=SimpleNamespace, Transformer=Transformer)
    members = {"prefill": lambda model, ids, at, **how: ids[:, -1], "decode_n_tokens": decode, "decode_one_token": 1}
    module(monkeypatch, "generate", **members)
    assert PEERS["gpt-fast"].lacks == []
    engine = GptFast(stand)
    model, shape, at, new = engine.generate(PROMPTS[:1], [9])
    assert (shape, at, new) == ((1, 1), [3], 8)
    told = vars(model.shape)
    assert (told["dim"], told["n_local_heads"], told["vocab_size"], told["n_layer"]) == (32, 2, 96, 2)
    assert sys.modules["generate"].decode_one_token == (1, {"mode": "reduce-overhead", "fullgraph": True})
    with pytest.raises(NotImplementedError, match="one sequence"):
        engine.generate(PROMPTS, [9, 9])


def test_what_a_peer_lacks_is_told() -> None:
    assert PEERS["vllm"].lacks in ([], ["vllm"])
    assert PEERS["transformers"].lacks == []
