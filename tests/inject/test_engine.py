"""The engine is the user's model, faster: its attributes, its state, its hooks, its moves, and its end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hasten
from hasten.errors import ConfigError, RequestError
from tests.tiny import TINY, build

IDS = torch.tensor([[5, 9, 30, 7, 12], [44, 3, 8, 21, 60]])
FAMILIES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "bert",
    "t5",
]  # views, transposed views, emptied parameters, encoder, two towers


def arguments(name: str) -> dict[str, torch.Tensor]:
    return TINY[name].own() or {"input_ids": IDS}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cast_is_undone_bit_for_bit_when_originals_are_kept(name: str) -> None:
    model = build(TINY[name])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    engine = hasten.init_inference(model, dtype=torch.bfloat16, keep_originals=True)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert engine.revert() is model
    after = model.state_dict()
    assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())


def test_a_cast_without_originals_reverts_only_by_force_and_refuses_before_touching_anything() -> None:
    model = build(TINY["llama"])
    engine = hasten.init_inference(model, dtype="bf16")
    with pytest.raises(ConfigError, match=r"keep_originals=True"):
        engine.revert()
    assert engine(IDS).logits.dtype == torch.bfloat16  # still serving
    engine.revert(force=True)
    assert next(model.parameters()).dtype == torch.float32
    with pytest.raises(RequestError, match="engine is over"):
        engine(IDS)


def test_widening_is_undone_exactly_without_originals() -> None:
    model = build(TINY["llama"], torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    engine = hasten.init_inference(model, dtype=torch.float32)
    assert engine(IDS).logits.dtype == torch.float32
    engine.revert()
    assert all(torch.equal(v, before[k]) and v.dtype == torch.bfloat16 for k, v in model.state_dict().items())


def test_attributes_of_the_model_are_the_engines() -> None:
    engine = hasten.init_inference(build(TINY["llama"]))
    assert engine.config.model_type == "llama"
    assert engine.device.type == "cpu"
    assert engine.generation_config is engine.module.generation_config
    with pytest.raises(AttributeError, match="nonsense"):
        _ = engine.nonsense


@pytest.mark.parametrize("name", FAMILIES)
def test_one_copy_of_the_weights(name: str) -> None:
    model = build(TINY[name])

    def memory() -> int:
        seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
        return sum(seen.values())

    before = memory()
    engine = hasten.init_inference(model)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    for b in engine.backbones:
        held |= {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in b.transformer.weights.values()}
    extra = sum(
        w.numel() * w.element_size()
        for b in engine.backbones
        for n, w in b.transformer.weights.items()
        if n.endswith("bias")
    )
    assert sum(held.values()) <= before + extra  # biases that only some parts have are filled up with zeros


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_moves_and_casts_under_the_engine(name: str) -> None:
    model, twin = build(TINY[name]), build(TINY[name])
    engine = hasten.init_inference(model)
    given = arguments(name)
    with torch.no_grad():
        engine.module.to(torch.float64)
        torch.testing.assert_close(engine(**given)[0], twin.double()(**given)[0], atol=1e-5, rtol=1e-5)
        engine.module.to(torch.float32)
        torch.testing.assert_close(engine(**given)[0], twin.float()(**given)[0], atol=3e-5, rtol=3e-5)
    assert all(b.calls == 2 and not b.detours for b in engine.backbones)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_loaded_under_the_engine_are_used(name: str) -> None:
    model, other = build(TINY[name]), build(TINY[name])
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.7)
    engine = hasten.init_inference(model)
    engine.module.load_state_dict(other.state_dict())
    with torch.no_grad():
        given = arguments(name)
        torch.testing.assert_close(engine(**given)[0], other(**given)[0], atol=3e-5, rtol=3e-5)
    state = engine.module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_deep_copy_is_a_model_of_its_own(name: str) -> None:
    engine = hasten.init_inference(build(TINY[name]))
    given = arguments(name)
    with torch.no_grad():
        want = engine(**given)[0].clone()
        twin = copy.deepcopy(engine.module)
        for p in engine.module.parameters():
            p.mul_(0)
        torch.testing.assert_close(twin(**given)[0], want)


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_inside_the_backbone_see_their_calls(name: str) -> None:
    model, twin = build(TINY[name]), build(TINY[name])
    engine = hasten.init_inference(model)
    seen: list[str] = []

    def listen(m: nn.Module, label: str) -> None:
        inner = [
            x for n, x in m.named_modules() if isinstance(x, nn.LayerNorm | nn.Linear) or "Norm" in type(x).__name__
        ]
        inner[0 if name != "bert" else 1].register_forward_hook(lambda *_: seen.append(label))

    listen(engine.backbones[0].module, "ours")
    given = arguments(name)
    with torch.no_grad():
        torch.testing.assert_close(engine(**given)[0], twin(**given)[0], atol=3e-5, rtol=3e-5)
    assert "ours" in seen
    assert engine.backbones[0].detours["forward hooks on submodules"] == 1


def test_training_mode_goes_to_the_models_own_forward_and_gradients_flow_there() -> None:
    engine = hasten.init_inference(build(TINY["llama"]))
    engine.module.train()
    engine(IDS).logits.sum().backward()
    assert engine.module.model.layers[0].self_attn.q_proj.weight.grad is not None
    assert engine.backbones[0].detours["the module is in training mode"] == 1


def test_a_model_in_training_mode_is_put_into_eval_and_told_so_and_put_back() -> None:
    model = build(TINY["gpt2"]).train()
    engine = hasten.init_inference(model)
    assert not model.training
    assert "training mode with dropout" in str(engine.explain())
    engine.revert()
    assert model.training
    assert model.transformer.h[0].attn.attn_dropout.training


def test_times_are_asked_for_and_cleared() -> None:
    engine = hasten.init_inference(build(TINY["llama"]))
    with pytest.raises(ConfigError, match="profiling is not enabled"):
        engine.model_times()
    engine.profile_model_time()
    engine(IDS)
    engine.generate(IDS, max_new_tokens=2, pad_token_id=0)
    times = engine.model_times()
    assert len(times) == 2
    assert all(t > 0 for t in times)
    assert engine.model_times() == []


def test_a_thin_wrapper_changes_nothing() -> None:
    model = build(TINY["llama"])
    forward = model.model.forward
    engine = hasten.init_inference(model, replace_with_kernel_inject=False)
    assert model.model.forward == forward
    assert "no backbone is fused" in str(engine.explain())
    assert engine(IDS).logits.shape == (2, 5, 67)


def test_a_saved_model_is_the_original_one(tmp_path: object) -> None:
    for name in ("llama", "gpt2", "gpt_neox"):
        model, twin = build(TINY[name]), build(TINY[name])
        engine = hasten.init_inference(model)
        engine.module.save_pretrained(f"{tmp_path}/{name}")
        back = type(model).from_pretrained(f"{tmp_path}/{name}")
        assert all(torch.equal(v, back.state_dict()[k]) for k, v in twin.state_dict().items())


def test_destroy_frees_the_model_for_another_engine() -> None:
    model = build(TINY["llama"])
    want = model(IDS).logits
    for _ in range(3):
        engine = hasten.init_inference(model)
        torch.testing.assert_close(engine(IDS).logits, want, atol=3e-5, rtol=3e-5)
        engine.destroy()
        engine.destroy()


def test_explain_tells_seams_ops_and_detours() -> None:
    engine = hasten.init_inference(build(TINY["gpt_neox"]), triangular_masking=True)
    engine(IDS)
    text = str(engine.explain())
    for part in (
        "gpt_neox (GPTNeoXModel), a decoder: 3 blocks",
        "filled on demand",
        "one token: linear ",
        "128 tokens: linear ",
        "calls: 1 fused",
    ):
        assert part in text


def test_a_reference_backend_can_be_asked_for() -> None:
    engine = hasten.init_inference(build(TINY["llama"]), backend="reference")
    assert set(engine.backbones[0].transformer.backends.values()) == {"reference"}
    with torch.no_grad():
        torch.testing.assert_close(engine(IDS).logits, build(TINY["llama"])(IDS).logits, atol=3e-5, rtol=3e-5)


def test_what_generation_needs_is_prepared_in_the_generator_that_calls_find() -> None:
    engine = hasten.init_inference(build(TINY["llama"]))
    engine.prepare(2, 9)
    assert engine.generating is not None
    made = engine.generating.native._generator
    assert made is not None
    assert [len(x.tokens) for x in engine.generate([[5, 9], [3]], max_new_tokens=3)] == [3, 3]
    assert engine.generating.native._generator is made
    with pytest.raises(RequestError, match="prepare: tokens=0 is not an integer"):
        engine.prepare(2, 0)
    engine.destroy()
    with pytest.raises(RequestError, match="this engine is over"):
        engine.prepare(2, 9)
    with pytest.raises(RequestError, match="no fused decoder"):
        hasten.init_inference(build(TINY["bert"])).prepare(2, 9)
