"""Live Megatron-LM models under Hasten give what they gave before, whatever the order of their fused rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import ConfigError, UnsupportedModel, WeightError
from hasten.families import FAMILIES
from hasten.inject.attach import attach
from hasten.inject.policy import resolve_policy
from hasten.module_inject.replace_policy import MegatronLayerPolicy
from tests.tiny.megatron import (
    VOCAB,
    WIDTH,
    BertModel,
    Era,
    Float16Module,
    GPTModel,
    ParallelTransformerLayer,
    build_megatron,
)

OLD = Era(0, "transformer", "attention", tokens_first=False, says_mask_type=False)
ERAS = {
    "today": Era(),
    "fused gelu": Era(gelu="fused"),
    "openai gelu": Era(gelu="openai", stack="transformer"),
    "version 1": Era(1, "transformer", "attention"),
    "version 0": OLD,
}
eras = pytest.mark.parametrize("era", ERAS.values(), ids=ERAS)
CLOSE: dict[str, Any] = {"atol": 3e-5, "rtol": 3e-5}


def suffix(era: Era) -> str:
    return "" if era.version == 2 else f"-v{era.version}"


def text(rows: int = 2, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """ids, positions, and a mask that is True where the future is hidden."""
    ids = torch.randint(0, VOCAB, (rows, tokens))
    hidden = torch.ones(tokens, tokens).triu(1).bool()[None, None]
    return ids, torch.arange(tokens)[None].expand(rows, -1), hidden


def fused(model: Any, family: str) -> tuple[Any, Any]:
    ours = copy.deepcopy(model)
    (backbone,) = attach(ours, family)
    backbone.install()
    return ours, backbone


@eras
@torch.no_grad()
def test_gpt_gives_the_logits_and_losses_it_gave(era: Era) -> None:
    theirs = build_megatron(GPTModel, era)
    ours, backbone = fused(theirs, f"megatron_gpt{suffix(era)}")
    for rows, tokens in ((2, 9), (1, 1), (1, 24)):
        inputs = text(rows, tokens)
        torch.testing.assert_close(ours(*inputs), theirs(*inputs), **CLOSE)
    labels = torch.randint(0, VOCAB, (1, 24))
    torch.testing.assert_close(ours(*inputs, labels=labels), theirs(*inputs, labels=labels), **CLOSE)
    assert backbone.calls == 4
    assert not backbone.detours


@torch.no_grad()
def test_a_model_inside_float16module_is_found() -> None:
    theirs = Float16Module(build_megatron(GPTModel, Era())).eval()
    ours, backbone = fused(theirs, "megatron_gpt")
    inputs = text()
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), **CLOSE)
    assert (backbone.path, backbone.calls) == ("module.language_model", 1)


@torch.no_grad()
def test_a_mask_that_resets_at_the_end_of_a_document_is_obeyed() -> None:
    theirs = build_megatron(GPTModel, Era())
    ours, _ = fused(theirs, "megatron_gpt")
    ids, positions, hidden = text(2, 11)
    hidden = hidden.repeat(2, 1, 1, 1)
    hidden[1, 0, 5:, :5] = True
    torch.testing.assert_close(ours(ids, positions, hidden), theirs(ids, positions, hidden), **CLOSE)


@eras
@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_bert_gives_the_logits_and_the_pooled_output_it_gave(era: Era, side: str) -> None:
    theirs = build_megatron(BertModel, era)
    ours, backbone = fused(theirs, f"megatron_bert{suffix(era)}")
    ids, types = torch.randint(0, VOCAB, (3, 8)), torch.randint(0, 2, (3, 8))
    seen = torch.ones(3, 8)
    if side != "none":
        seen[1, slice(0, 3) if side == "left" else slice(5, 8)] = 0
    (logits, binary), (want, pooled) = ours(ids, seen, types), theirs(ids, seen, types)
    torch.testing.assert_close(logits[seen.bool()], want[seen.bool()], **CLOSE)
    whole = seen[:, 0].bool()  # what is pooled from a token of padding means nothing
    torch.testing.assert_close(binary[whole], pooled[whole], **CLOSE)
    assert (backbone.calls, backbone.detours.total()) == (1, 0)


@pytest.mark.parametrize("kind", ["gpt", "bert"])
@pytest.mark.parametrize("version", [0, 1, 2, 3])
@torch.no_grad()
def test_the_policy_of_deepspeed_chooses_the_order_of_the_rows(kind: str, version: int) -> None:
    policy = type("Mine", (MegatronLayerPolicy,), {"megatron_v2": False, "version": version})
    theirs = build_megatron(GPTModel if kind == "gpt" else BertModel, Era(min(version, 2)))
    family = resolve_policy(theirs, {ParallelTransformerLayer: policy}, FAMILIES)
    assert family is not None
    ours, backbone = fused(theirs, family)
    assert backbone.tower.causal == (kind == "gpt"), "a layer that says its kind of mask is believed"
    ids, positions, hidden = text()
    inputs = (ids, positions, hidden) if kind == "gpt" else (ids, torch.ones(2, 9), torch.zeros_like(ids))
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), **CLOSE)


@torch.no_grad()
def test_the_wrong_order_of_rows_gives_something_else() -> None:
    theirs = build_megatron(GPTModel, Era(1))
    ours, _ = fused(theirs, "megatron_gpt")
    inputs = text()
    assert (ours(*inputs) - theirs(*inputs)).abs().max() > 0.01


@eras
@torch.no_grad()
def test_state_dict_keeps_names_and_values_and_revert_is_exact(era: Era) -> None:
    model = build_megatron(GPTModel, era)
    before = copy.deepcopy(model.state_dict())
    (backbone,) = attach(model, f"megatron_gpt{suffix(era)}")
    backbone.install()
    during = model.state_dict()
    assert list(during) == list(before)
    assert all(torch.equal(during[k], v) for k, v in before.items())
    backbone.remove()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@torch.no_grad()
def test_what_the_fused_path_does_not_know_goes_to_the_models_own_forward() -> None:
    theirs = build_megatron(GPTModel, Era())
    ours, backbone = fused(theirs, "megatron_gpt")
    ids, positions, hidden = text()
    for more in ({"inference_params": object()}, {}):
        got = ours.language_model(ids, positions, hidden, **more)
        assert got.shape == (9, 2, WIDTH)
        torch.testing.assert_close(got, theirs.language_model(ids, positions, hidden, **more), **CLOSE)
    assert dict(backbone.detours) == {"inference_params was given": 1}
    assert backbone.calls == 1


@pytest.mark.parametrize("kind", [GPTModel, BertModel])
@torch.no_grad()
def test_init_inference_takes_a_megatron_module_by_its_policy(kind: type[GPTModel] | type[BertModel]) -> None:
    model = build_megatron(kind, Era())
    inputs = text() if kind is GPTModel else (text()[0], torch.ones(2, 9), torch.ones(2, 9, dtype=torch.long))
    want = model(*inputs)
    engine = hasten.init_inference(
        model, injection_policy={ParallelTransformerLayer: MegatronLayerPolicy}, certify=True
    )
    torch.testing.assert_close(engine(*inputs), want, **CLOSE)
    assert engine.certificate is not None
    assert engine.certificate.passed
    assert engine.revert() is model


@torch.no_grad()
def test_half_precision_errs_no_more_than_the_models_own() -> None:
    inputs = text()
    want = build_megatron(GPTModel, Era())(*inputs)
    theirs = build_megatron(GPTModel, Era()).bfloat16()
    ours, _ = fused(theirs, "megatron_gpt")
    error = [(m(*inputs).float() - want).square().mean().sqrt() for m in (ours, theirs)]
    assert error[0] <= 1.5 * error[1] + 1e-3


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"normalization": "RMSNorm"}, "normalization"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_experts": [4]}, "num_experts"),
    ],
    ids=str,
)
def test_settings_without_a_description_are_refused_by_name(more: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        attach(build_megatron(GPTModel, Era(), **more), "megatron_gpt")


def test_sizes_that_contradict_the_config_and_other_models_are_refused() -> None:
    with pytest.raises(WeightError, match="dense_h_to_4h"):
        attach(build_megatron(GPTModel, Era(), ffn_hidden_size=77), "megatron_gpt")
    with pytest.raises(UnsupportedModel, match="language_model"):
        attach(torch.nn.Linear(2, 2), "megatron_gpt")
    with pytest.raises(UnsupportedModel, match="injection_policy"):
        attach(build_megatron(GPTModel, Era()))


def test_no_weight_is_forgotten() -> None:
    model = build_megatron(GPTModel, Era())
    model.language_model.encoder.add_module("extra", torch.nn.Linear(2, 2))
    with pytest.raises(WeightError, match="extra"):
        attach(model, "megatron_gpt")
