"""The certificate finds what is wrong, falls back, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten import ops
from hasten.ops.table import Implementation
from tests.tiny import TINY, build

IDS = torch.tensor([[5, 9, 30, 7, 12]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_every_family_passes_without_falling_back(name: str, dtype: torch.dtype) -> None:
    engine = hasten.init_inference(build(TINY[name], dtype), certify=True)
    c = engine.certificate
    assert c is not None
    assert c.passed
    assert c.fallbacks == ()
    assert len(c.blocks) == sum(len(b.tower.blocks) for b in engine.backbones)
    assert c.agreement > (0.99 if dtype is torch.float32 else 0.5)


@pytest.fixture
def broken() -> Iterator[list[Any]]:
    """An implementation of `project` that is wrong where the matrix is the first in the list."""
    victims: list[Any] = []

    def accepts(x: Tensor, m: ops.Matrix, *rest: Any) -> bool:
        return any(m.weight is v for v in victims)

    def wrong(x: Tensor, m: ops.Matrix, *rest: Any) -> Tensor:
        return ops.project.reference(x, m, *rest) * 1.01

    planted = Implementation("planted", wrong, frozenset({"cpu"}), accepts)
    serving = ops.project.serving.get("cpu", ())
    ops.project.serving["cpu"] = (planted, *serving)
    yield victims
    ops.project.serving["cpu"] = serving


def test_a_planted_wrong_kernel_makes_its_block_fall_back(broken: list[Any]) -> None:
    engine = hasten.init_inference(build(TINY["llama"]))
    want = build(TINY["llama"])(IDS).logits
    broken.append(engine.backbones[0].transformer.layers[1].mlp.down.weight)
    assert (engine(IDS).logits - want).abs().max() > 1e-3
    from hasten.inject.certificate import certify

    c = certify(engine)
    assert c.fallbacks == ("model block 1: references",)
    assert [b.fell_back for b in c.blocks] == [False, True, False]
    assert c.passed
    assert "fell back: model block 1" in str(c)
    assert "fell back: block 1: reference" in str(engine.explain())
    torch.testing.assert_close(engine(IDS).logits, want, atol=3e-5, rtol=3e-5)


def test_a_description_that_does_not_fit_gives_way_to_the_model_itself() -> None:
    engine = hasten.init_inference(build(TINY["llama"]))
    b = engine.backbones[0]
    wrong = replace(b.tower.blocks[0], attention=replace(b.tower.blocks[0].attention, scale=2.0))
    b.tower = replace(b.tower, blocks=(wrong, *b.tower.blocks[1:]))
    b.transformer = type(b.transformer)(b.tower, b.transformer.weights)
    from hasten.inject.certificate import certify

    c = certify(engine)
    assert not c.passed
    assert c.fallbacks == ("model: the model's own forward",)
    torch.testing.assert_close(engine(IDS).logits, build(TINY["llama"])(IDS).logits)
    with pytest.raises(hasten.errors.RequestError, match="the certificate refused"):
        engine.generate([[5, 6]])


def test_the_users_own_inputs_are_the_probe() -> None:
    engine = hasten.init_inference(build(TINY["bert"]), certify={"inputs": {"input_ids": IDS}})
    assert engine.certificate is not None
    assert engine.certificate.passed


def test_a_model_that_wants_more_than_tokens_is_certified_at_its_backbone() -> None:
    import transformers

    shape = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    model = transformers.BertForMultipleChoice(transformers.BertConfig(vocab_size=67, **shape)).eval()
    engine = hasten.init_inference(model, certify=True)
    assert engine.certificate is not None
    assert engine.certificate.passed


def test_a_certificate_is_plain_values_for_json() -> None:
    import json

    engine = hasten.init_inference(build(TINY["gpt2"]), certify=True)
    assert engine.certificate is not None
    back = json.loads(json.dumps(engine.certificate.to_dict()))
    assert back["passed"] is True
    assert len(back["blocks"]) == 3


def test_one_block_at_a_time_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    from hasten.inject import watch

    wide: list[weakref.ref[Tensor]] = []
    real = watch._widened

    def widened(*args: Any) -> Any:
        assert all(w() is None for w in wide)
        made = real(*args)
        wide.extend(weakref.ref(m.weight) for m in (made.attention.qkv, made.attention.out))
        return made

    monkeypatch.setattr(watch, "_widened", widened)
    gc.disable()  # nothing may wait for a collection
    try:
        hasten.init_inference(build(TINY["llama"], torch.bfloat16), certify=True)
    finally:
        gc.enable()
    assert len(wide) == 6
