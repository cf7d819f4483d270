"""What init_inference refuses: one clear error each, and the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import hasten
from hasten.errors import ConfigError, HastenError, UnsupportedModel, WeightError
from tests.tiny import TINY, build


def llama() -> Any:
    return build(TINY["llama"])


def poisoned() -> Any:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.lm_head.weight.data[0, 0] = float("inf")
    return model


def on_meta(part: bool) -> Any:
    model = llama()
    (model.model.layers[0] if part else model).to("meta")
    return model


def misshapen() -> Any:
    model = llama()
    model.config.intermediate_size, model.config.vocab_size = 60, 70
    return model


def patched() -> Any:
    model = llama()
    inner = model.model.layers[0].mlp
    inner.forward = inner.forward
    return model


def with_config(**fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = llama()
        for name, value in fields.items():
            setattr(model.config, name, value)
        return model

    return make


def unknown_parameter() -> Any:
    model = llama()
    model.model.layers[2].gate = nn.Parameter(torch.zeros(3))
    return model


def integers() -> Any:
    model = llama()
    p = model.model.layers[0].mlp.up_proj
    p.weight = nn.Parameter(torch.ones_like(p.weight, dtype=torch.int8), requires_grad=False)
    return model


def plain() -> Any:
    return nn.Sequential(nn.Linear(3, 3))


def outside() -> Any:
    shape = {
        "vocab_size": 67,
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
    }
    return T.DebertaV2Model(T.DebertaV2Config(**shape))


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], type[HastenError], str]] = {
    "unsupported architecture": (outside, {}, UnsupportedModel, "'deberta-v2'. Three things would work"),
    "no transformers config": (plain, {}, UnsupportedModel, "Sequential, which has no transformers config"),
    "meta": (lambda: on_meta(False), {}, WeightError, "tensors are on the meta device"),
    "partly meta": (lambda: on_meta(True), {}, WeightError, r"model\.layers\.0\.self_attn\.q_proj\.weight"),
    "NaN, named": (poisoned, {}, WeightError, r"model\.layers\.1\.mlp\.up_proj\.weight, lm_head\.weight"),
    "shapes, all of them": (misshapen, {}, WeightError, r"(?s)embed_tokens.*\(67, 48\).*layers\.2\.mlp\.down_proj"),
    "a replaced forward": (patched, {}, ConfigError, r"forward of layers\.0\.mlp has been replaced"),
    "a parameter nobody knows": (unknown_parameter, {}, WeightError, r"model\.layers\.2\.gate"),
    "integer weights": (integers, {}, WeightError, r"up_proj\.weight \(torch\.int8\)"),
    "a field nobody reads": (with_config(qk_layernorm=True), {}, ConfigError, "qk_layernorm=True"),
    "an unknown activation": (with_config(hidden_act="mish"), {}, ConfigError, "hidden_act='mish'"),
    "an unknown dtype": (llama, {"dtype": "fp12"}, ConfigError, "fp12"),
    "int8": (llama, {"dtype": torch.int8}, ConfigError, "int8"),
    "two ranks": (llama, {"mp_size": 2}, ConfigError, "mp_size"),
    "an unknown key": (llama, {"replace_with_kernel_injekt": True}, ConfigError, "replace_with_kernel_inject"),
    "a policy for a class it does not have": (
        llama,
        {"injection_policy": {nn.LSTM: ("out",)}},
        ConfigError,
        "LSTM",
    ),
    "bidirectional attention of a causal model": (
        llama,
        {"triangular_masking": False},
        ConfigError,
        "triangular_masking",
    ),
    "a certificate with odd settings": (llama, {"certify": {"factor": -1.0}}, ConfigError, "factor"),
    "a certificate with unknown settings": (llama, {"certify": {"sed": 1}}, ConfigError, "sed"),
    "inputs that the model cannot take": (
        llama,
        {"certify": {"inputs": {"input_ids": torch.tensor([[1.5]])}}},
        HastenError,
        "integers",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_is_clear_and_leaves_the_model_as_it_was(case: str) -> None:
    make, options, error, says = CASES[case]
    torch.manual_seed(0)
    model = make().train()
    tensors = {n: (t, t.data_ptr(), t.dtype, t._version) for n, t in model.state_dict(keep_vars=True).items()}
    forwards = {n: m.forward for n, m in model.named_modules()}
    with pytest.raises(error, match=says):
        hasten.init_inference(model, **options)
    assert model.training
    assert {n: m.forward for n, m in model.named_modules()} == forwards
    after = model.state_dict(keep_vars=True)
    assert after.keys() == tensors.keys()
    for name, (t, _, dtype, _) in tensors.items():
        assert after[name] is t
        assert t.dtype == dtype
    torch.manual_seed(0)
    clean = make()
    for name, t in clean.state_dict().items():
        if not t.is_meta:
            assert torch.equal(t, after[name].detach()) or bool(torch.isnan(t).any())


def test_no_module_at_all() -> None:
    with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module, got str"):
        hasten.init_inference("gpt2")  # pyright: ignore[reportArgumentType]


def test_a_model_is_taken_over_once() -> None:
    model = llama()
    engine = hasten.init_inference(model)
    for again in (model, engine):
        with pytest.raises(ConfigError, match="under Hasten already"):
            hasten.init_inference(again)
    engine.revert()
    hasten.init_inference(model)


def test_wrappers_are_named() -> None:
    with pytest.raises(UnsupportedModel, match="DataParallel wraps"):
        hasten.init_inference(nn.DataParallel(llama()))


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (torch.tensor([[5, 67]]), r"\[0, 1\] is 67; the vocabulary has ids 0 to 66"),
        (torch.tensor([[-1]]), r"\[0, 0\] is -1"),
        (torch.zeros(2, 0, dtype=torch.long), "an empty prompt"),
        (torch.zeros(0, 3, dtype=torch.long), "a batch of zero prompts"),
        (torch.ones(1, 3), r"must be integers, got torch\.float32"),
        (torch.ones(1, 3, dtype=torch.bool), "must be integers"),
        (torch.ones(1, 65, dtype=torch.long), "65 tokens; the model's position table ends at 64"),
    ],
)
def test_requests_that_make_no_sense(ids: torch.Tensor, says: str) -> None:
    engine = hasten.init_inference(build(TINY["gpt2"]))
    for call in (lambda: engine(ids), lambda: engine(input_ids=ids), lambda: engine.generate(ids, max_new_tokens=2)):
        with pytest.raises(hasten.errors.RequestError, match=says):
            call()
    assert engine(torch.tensor([[5]])).logits.shape == (1, 1, 67)  # and goes on serving


def test_negative_lengths() -> None:
    engine = hasten.init_inference(llama())
    with pytest.raises(hasten.errors.RequestError, match="max_new_tokens=-3"):
        engine.generate(torch.tensor([[5]]), max_new_tokens=-3)
