"""The option batch_invariant: what it is refused for, and that generation is told of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import hasten
from hasten import ops
from hasten.errors import ConfigError
from hasten.inject.attach import attach
from hasten.inject.choices import choices
from hasten.inject.invariance import check_fallbacks, check_invariance, unkept
from hasten.inject.native import Native
from tests.tiny import TINY, build

CUDA = torch.device("cuda", 0)


def hopper(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), triton: bool = True) -> None:
    """As if there were such a GPU."""
    from hasten.inject import invariance

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(invariance.BACKENDS, "triton", (lambda: triton, "hasten.ops.triton"))


def refusal(name: str, dtype: torch.dtype | None = torch.float16, device: torch.device | None = CUDA) -> str:
    model = build(TINY[name])
    with pytest.raises(ConfigError) as error:
        check_invariance(model, attach(model), dtype, device)
    return str(error.value)


def test_a_model_on_a_cpu_is_refused_and_stays_as_it_was() -> None:
    model = build(TINY["llama"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="batch_invariant=True cannot be kept for LlamaForCausalLM: it runs on cpu"):
        hasten.init_inference(model, dtype=torch.float16, batch_invariant=True, device="cpu")
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert "forward" not in vars(model.model)


def test_every_reason_is_told_at_once() -> None:
    said = refusal("mixtral", None, torch.device("cpu"))
    for part in ("it runs on cpu", "weights are float32: pass dtype=torch.bfloat16", "experts"):
        assert part in said


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mixtral", "experts"),
        ("bert", "no decoder with a language model head"),
        ("t5", "no decoder with a language model head"),
        ("gpt2", "products read 8 columns at a time, and tokens has 36"),
        ("falcon-rw", "alibi is rounded to bfloat16"),
    ],
)
def test_models_without_such_kernels_are_refused_by_name(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    assert says in refusal(name)


def test_devices_that_lack_something_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch, capability=(8, 6))
    assert "compute capability is 8.6; 9.0 (H100) or higher is needed" in refusal("llama")
    hopper(monkeypatch, triton=False)
    assert "Triton 3.4 or newer is not installed" in refusal("llama")
    hopper(monkeypatch)
    assert "weights are float32" in refusal("llama", dtype=None)


def test_a_decoder_of_16_bits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    for name, dtype in (("llama", torch.bfloat16), ("gemma2-capped", torch.float16), ("opt", torch.float16)):
        model = build(TINY[name])
        check_invariance(model, attach(model), dtype, CUDA)
    model = build(TINY["llama"]).half()
    check_invariance(model, attach(model), None, CUDA)


def test_heads_and_rows_that_no_program_holds_are_refused() -> None:
    def tower(**fields: Any) -> Any:
        config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, intermediate_size=64, **fields)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        return attach(model)[0].tower

    heads = tower(hidden_size=1024, num_attention_heads=2, num_key_value_heads=1, head_dim=512)
    assert any("2 heads of 512 numbers that share keys" in why for why in unkept(heads))
    wide = tower(hidden_size=32768, num_attention_heads=256, num_key_value_heads=256)
    assert any("rows of 32768 numbers" in why for why in unkept(wide))
    assert not unkept(tower(hidden_size=128, num_attention_heads=4, num_key_value_heads=2))


@pytest.mark.parametrize("other", [{"backend": "reference"}, {"replace_with_kernel_inject": False}])
def test_options_that_contradict_it_are_named(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="batch_invariant=True.*leave one of them out"):
        hasten.init_inference(build(TINY["llama"]), batch_invariant=True, **other)


def test_blocks_that_the_certificate_lets_fall_are_an_error() -> None:
    engine = hasten.init_inference(build(TINY["llama"]))
    check_fallbacks(engine.backbones)
    engine.backbones[0].transformer.backends[1] = "reference"
    with pytest.raises(ConfigError, match="1 blocks lost more than the certificate allows"):
        check_fallbacks(engine.backbones)


def test_generation_is_told_and_so_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.inject import api, native

    monkeypatch.setattr(api, "check_invariance", lambda *_: None)
    told: list[bool] = []
    made = native.Generator
    monkeypatch.setattr(native, "Generator", lambda *a, invariant, **more: told.append(invariant) or made(*a, **more))
    for asked in (True, False):
        engine = hasten.init_inference(build(TINY["llama"]), batch_invariant=asked)
        assert engine.generating is not None
        assert copy.copy(engine.generating.native).invariant == asked
        engine.generate([[5, 6]], max_new_tokens=2)  # the list
        engine.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False, pad_token_id=0)  # and the tensor
    assert told == [True, False]


def test_explain_says_that_it_is_on_and_what_is_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(TINY["llama"])
    engine = hasten.init_inference(model)
    assert "batch-invariant" not in str(engine.explain())
    assert engine.generating is not None
    live = engine.generating
    live.native = Native(live.native.backbone, limit=None, graphs=True, invariant=True)
    live.loops["beams"] += 2
    text = str(engine.explain())
    assert "batch-invariant: native generation answers a request with the same bits" in text
    assert "2 calls were answered by transformers' loop: not batch-invariant" in text


def test_what_would_run_is_told_of_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[None] = []

    def mode() -> Any:
        entered.append(None)
        return ops.use(None)  # a CPU has nothing to choose from in the mode itself

    (b,) = hasten.init_inference(build(TINY["llama"])).backbones
    free = choices(b.transformer, 1, True)
    monkeypatch.setattr(ops, "invariant", mode)
    assert choices(b.transformer, 1, True, invariant=True) == free
    assert entered


@pytest.mark.gpu
def test_an_engine_on_a_gpu_answers_alike_in_every_company() -> None:
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1003,
    )
    model = transformers.LlamaForCausalLM(config)
    engine = hasten.init_inference(model, dtype=torch.bfloat16, batch_invariant=True, certify=True)
    b = engine.explain().backbones[0]
    for chosen in (b.one_token, b.many_tokens):
        assert {"linear triton", "attend_pages triton", "project triton", "up triton"} <= set(chosen)
        assert not any(o.endswith(("cublas", "cudnn", "flash")) for o in chosen)
    batch = [torch.randint(3, 1003, (1 + 31 * i % 90,)).tolist() for i in range(20)]
    alone = [engine.generate([p], max_new_tokens=12, ignore_eos=True)[0].tokens for p in batch]
    assert [x.tokens for x in engine.generate(batch, max_new_tokens=12, ignore_eos=True)] == alone
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    live = engine.generate(torch.tensor([batch[1]], device="cuda"), **how)
    assert live[0, len(batch[1]) :].tolist() == list(alone[1])
