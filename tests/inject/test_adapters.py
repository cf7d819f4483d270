"""Models with PEFT adapters: merged on request with the numbers that PEFT gives, refused and untouched otherwise."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import hasten
from hasten.errors import ConfigError, HastenError, UnsupportedModel, WeightError
from tests.tiny import TINY, build

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LINEARS = ["q_proj", "v_proj", "o_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=3, lora_alpha=7, target_modules=LINEARS),
    "LoRA on everything": peft.LoraConfig(r=2, target_modules="all-linear", use_rslora=True),
    "DoRA": peft.LoraConfig(r=3, target_modules=LINEARS, use_dora=True),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoKr": peft.LoKrConfig(r=2, alpha=3, target_modules=LINEARS),
    "LoRA and a head of its own": peft.LoraConfig(r=3, target_modules=LINEARS, modules_to_save=["lm_head"]),
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 3, 30, 44, 4]])
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


def moved(model: Any) -> Any:
    """The model with no adapter left that does nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def wrapped(name: str = "LoRA", base: str = "llama") -> Any:
    return moved(peft.get_peft_model(build(TINY[base]), copy.deepcopy(CONFIGS[name])))


def injected() -> Any:
    return moved(peft.inject_adapter_in_model(copy.deepcopy(CONFIGS["LoRA"]), build(TINY["llama"])))


def added() -> Any:
    model = build(TINY["llama"])
    try:
        model.add_adapter(copy.deepcopy(CONFIGS["LoRA"]))
    except ValueError as refusal:  # transformers sets the oldest PEFT that it works with by itself
        pytest.skip(str(refusal))
    return moved(model)


def prompts() -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=2, token_dim=48)
    return moved(peft.get_peft_model(build(TINY["llama"]), config))


def refused(model: nn.Module, error: type[HastenError], says: str, **options: Any) -> None:
    """init_inference refuses the model, and it is as it was: its tensors, its modules and what it computes."""
    tensors = {n: (t, t.detach().clone(), t._version) for n, t in model.state_dict(keep_vars=True).items()}
    modules, forwards = dict(model.named_modules()), {n: m.forward for n, m in model.named_modules()}
    with pytest.raises(error, match=says):
        hasten.init_inference(model, **options)
    assert dict(model.named_modules()) == modules
    assert {n: m.forward for n, m in model.named_modules()} == forwards
    after = model.state_dict(keep_vars=True)
    assert after.keys() == tensors.keys()
    for n, (t, value, version) in tensors.items():
        assert after[n] is t
        assert t._version == version
        assert torch.equal(t, value) or bool(t.isnan().any())


@pytest.mark.parametrize("make", [wrapped, injected, added, prompts], ids=lambda m: m.__name__)
def test_adapters_are_refused_unless_they_are_to_be_merged(make: Any) -> None:
    refused(make(), UnsupportedModel, r"has PEFT adapters \(.* more\).*merge_adapters=True")


@pytest.mark.parametrize("make", [injected, added, prompts], ids=lambda m: m.__name__)
def test_adapters_that_nothing_merges_are_refused_even_then(make: Any) -> None:
    refused(make(), UnsupportedModel, r"no merge_and_unload\(\)", merge_adapters=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_adapters_compute_what_peft_computes(name: str) -> None:
    model = wrapped(name)
    with torch.no_grad():
        want, plain = model(IDS).logits, build(TINY["llama"])(IDS).logits
        text = model.generate(input_ids=IDS, **GREEDY)
        assert (want - plain).abs().max() > 0.01  # the adapter matters
        engine = hasten.init_inference(model, merge_adapters=True)
        torch.testing.assert_close(engine(IDS).logits, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(engine.generate(IDS, **GREEDY), text)
    assert type(engine.module).__name__ == "LlamaForCausalLM"
    assert not any("peft" in type(m).__module__ for m in engine.module.modules())
    assert engine.module.state_dict().keys() == build(TINY["llama"]).state_dict().keys()
    assert all(b.calls > 0 and not b.detours for b in engine.backbones)


def test_a_merged_model_reverts_to_the_merged_one() -> None:
    model = wrapped()
    want = model(IDS).logits.detach()
    back = hasten.init_inference(model, merge_adapters=True).revert()
    torch.testing.assert_close(back(IDS).logits, want, atol=1e-4, rtol=1e-4)
    hasten.init_inference(back)


def test_an_encoder_with_adapters_is_merged() -> None:
    config = peft.LoraConfig(r=3, target_modules=["query", "value", "dense"])
    model = moved(peft.get_peft_model(build(TINY["bert"]), config))
    with torch.no_grad():
        want = model(IDS).logits
        engine = hasten.init_inference(model, merge_adapters=True)
        torch.testing.assert_close(engine(IDS).logits, want, atol=1e-4, rtol=1e-4)


def test_merging_is_harmless_where_there_is_nothing_to_merge() -> None:
    model = build(TINY["llama"])
    assert hasten.init_inference(model, merge_adapters=True).module is model


def test_nothing_is_merged_into_a_model_that_is_refused_for_another_reason() -> None:
    strange, poisoned, unknown = wrapped(), wrapped(), wrapped()
    strange.config.hidden_act = "mish"
    refused(strange, ConfigError, "hidden_act='mish'", merge_adapters=True)
    poisoned.base_model.model.model.layers[1].mlp.up_proj.weight.data[2, 2] = float("nan")
    refused(poisoned, WeightError, r"layers\.1\.mlp\.up_proj\.weight", merge_adapters=True)
    unknown.base_model.model.model.layers[0].gate = nn.Parameter(torch.zeros(2))
    refused(unknown, WeightError, r"layers\.0\.gate", merge_adapters=True)
    refused(wrapped(), ConfigError, "LSTM", merge_adapters=True, injection_policy={nn.LSTM: ("out",)})
