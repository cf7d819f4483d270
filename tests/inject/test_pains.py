"""What failed users of DeepSpeed-Inference, each as a test of its own name."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers as T

import hasten
from hasten.errors import RequestError, WeightError
from tests.tiny import TINY, build

GREEDY = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0}
GPTS = ["gpt2", "gpt_neo", "gptj", "gpt_neox", "bloom", "opt", "llama"]  # the ones it injected kernels into


@pytest.mark.parametrize("name", GPTS)
def test_wrong_text_with_left_padding(name: str) -> None:
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    alone = torch.tensor([[7, 33, 12]])
    padded = torch.tensor([[0, 0, 0, 0, 7, 33, 12], [9, 8, 7, 6, 5, 4, 3]])
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1] * 7])
    batch = engine.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(batch, theirs.generate(padded, attention_mask=mask, **GREEDY))
    if TINY[name].left_padding:
        assert torch.equal(batch[0, 7:], theirs.generate(alone, **GREEDY)[0, 3:])
    native = engine.generate([[7, 33, 12], [9, 8, 7, 6, 5, 4, 3]], max_new_tokens=10, min_new_tokens=10)
    assert list(native[0].tokens) == theirs.generate(alone, **GREEDY)[0, 3:].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GPTS)
def test_nan_or_gibberish_in_half_precision_and_bf16_refused(name: str, dtype: torch.dtype) -> None:
    exact = build(TINY[name])
    engine = hasten.init_inference(build(TINY[name]), dtype=dtype)
    ids = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        want, got = exact(ids).logits, engine(ids).logits
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    assert (got.float() - want).norm() / want.norm() < 0.05
    out = engine.generate([[5, 6, 7]], max_new_tokens=8)
    assert len(out[0].tokens) >= 1


def test_degenerate_output_with_meta_device_loading() -> None:
    with torch.device("meta"):
        model = T.LlamaForCausalLM(build(TINY["llama"]).config)
    with pytest.raises(WeightError, match="meta device, without values"):
        hasten.init_inference(model, dtype=torch.float16)


def test_batch_size_fixed_at_first_call() -> None:
    theirs, engine = build(TINY["gpt2"]), hasten.init_inference(build(TINY["gpt2"]))
    for rows, width in ((1, 4), (8, 6), (3, 2), (8, 12), (1, 1)):
        ids = torch.randint(3, 60, (rows, width))
        assert torch.equal(engine.generate(ids, **GREEDY), theirs.generate(ids, **GREEDY))
        native = engine.generate(ids.tolist(), max_new_tokens=10, min_new_tokens=10)
        assert [list(g.tokens) for g in native] == [theirs.generate(i[None], **GREEDY)[0, width:].tolist() for i in ids]


def test_max_out_tokens_crash_when_exceeded() -> None:
    engine = hasten.init_inference(build(TINY["llama"]), max_out_tokens=12)
    ids = torch.randint(3, 60, (1, 8))
    for call in (
        lambda: engine.generate(ids, **GREEDY),  # as the first argument
        lambda: engine.generate(inputs=ids, **GREEDY),
        lambda: engine.generate(input_ids=ids, **GREEDY),
        lambda: engine.generate(ids.tolist(), max_new_tokens=10),
    ):
        with pytest.raises(RequestError, match="12"):
            call()
    assert engine.generate(ids, **GREEDY | {"max_new_tokens": 4, "min_new_tokens": 4}).shape == (1, 12)
    unlimited = hasten.init_inference(build(TINY["llama"]))
    assert unlimited.generate(ids, **GREEDY | {"max_new_tokens": 50, "min_new_tokens": 50}).shape == (1, 58)


def test_second_model_in_one_process_corrupting_the_first() -> None:
    one, two = build(TINY["gpt2"]), build(TINY["gpt2"])
    with torch.no_grad():
        for p in two.parameters():
            p.mul_(0.8)
    ids = torch.randint(3, 60, (2, 5))
    want = [m.generate(ids, **GREEDY) for m in (one, two)]
    engines = [hasten.init_inference(m) for m in (one, two)]
    assert all(torch.equal(e.generate(ids, **GREEDY), w) for e, w in zip(engines, want, strict=True))
    streams = [e.generate(ids.tolist(), max_new_tokens=10, min_new_tokens=10, stream=True) for e in engines]
    tokens: list[dict[int, list[int]]] = [{}, {}]
    for pair in zip(*streams, strict=True):  # in turns, token by token
        for kept, event in zip(tokens, pair, strict=True):
            kept.setdefault(event.index, []).append(event.token)
    for kept, w in zip(tokens, want, strict=True):
        assert [kept[0], kept[1]] == w[:, 5:].tolist()
    engines[1].destroy()
    gc.collect()
    assert torch.equal(engines[0].generate(ids, **GREEDY), want[0])


def test_breakage_on_a_newer_transformers() -> None:
    """The seam takes arguments by name, and leaves those that it has never heard of to the model itself."""
    engine = hasten.init_inference(build(TINY["llama"]))
    ids = torch.randint(3, 60, (1, 4))
    with torch.no_grad():
        want = build(TINY["llama"])(ids).logits
        got = engine.module.model(ids, an_argument_of_tomorrow=True).last_hidden_state
        torch.testing.assert_close(engine.module.lm_head(got), want, atol=3e-5, rtol=3e-5)
    assert engine.backbones[0].detours["an_argument_of_tomorrow was given"] == 1
