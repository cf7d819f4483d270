"""generate() of a live model goes native where that gives transformers' own tokens, and says why where it does not."""

from __future__ import annotations

import copy
import threading
from functools import partial
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

import hasten
from hasten.errors import RequestError
from hasten.runtime import Generator
from tests.families.parity import padded, tokens
from tests.inject.vocabulary import bytes_and_merges
from tests.tiny import TINY, build

DECODERS = [n for n, t in TINY.items() if t.kind == "decoder"]
IDS = torch.tensor([[9, 8, 40, 4, 33], [5, 6, 7, 21, 17]])
LEFT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}


def pair(name: str = "llama", **options: Any) -> tuple[T.PreTrainedModel, hasten.InferenceEngine]:
    """A model, and an engine with its twin."""
    return build(TINY[name]), hasten.init_inference(build(TINY[name]), **options)


def counts(engine: hasten.InferenceEngine) -> tuple[int, dict[str, int]]:
    assert engine.generating is not None
    return engine.generating.served, dict(engine.generating.loops)


WAYS: dict[str, dict[str, Any]] = {
    "padded": {"min_new_tokens": 9},
    "padded rows that end": {"eos_token_id": list(range(3, 30)), "min_new_tokens": 2},
    "a repetition penalty": {"repetition_penalty": 1.3, "max_length": 18, "max_new_tokens": None, "use_cache": False},
}
SCALES = {"positions that scale with other rows or calls"}
DECLINED = {
    "llama-dynamic": SCALES,
    "phi3-longrope": SCALES,
    "openai-gpt": {"positions that count padding"},  # in transformers 4
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_transformers_tokens(name: str, way: str) -> None:
    theirs, engine = pair(name)
    ids, mask = padded(name, "left")
    if "padded" not in way or not TINY[name].left_padding:
        mask = torch.ones_like(mask)
    how = GREEDY | {"attention_mask": mask} | WAYS[way]
    assert torch.equal(engine.generate(ids, **how), theirs.generate(ids, **how))
    served, loops = counts(engine)
    assert served == 1 or loops.keys() <= DECLINED.get(name, set())
    assert bool(engine.backbones[0].calls) == (not served)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "beams": ("beams", {"num_beams": 2}),
    "a dict": ("return_dict_in_generate", {"return_dict_in_generate": True}),
    "draws": ("sampling on a CPU repeats transformers' own draws", {"do_sample": True, "top_k": 5}),
    "a static cache": ("a cache_implementation", {"cache_implementation": "static"}),
    "a prompt in chunks": ("a prefill_chunk_size", {"prefill_chunk_size": 2}),
    "n-grams": ("NoRepeatNGramLogitsProcessor", {"no_repeat_ngram_size": 2}),
    "a time limit": ("MaxTimeCriteria", {"max_time": 100.0}),
    "a text to stop at": ("stop_strings", {"stop_strings": ["man"], "tokenizer": bytes_and_merges()}),
    "look-up in the prompt": ("assisted generation", {"prompt_lookup_num_tokens": 2}),
    "a processor twice": (
        "repetition_penalty twice",
        {
            "logits_processor": [T.RepetitionPenaltyLogitsProcessor(1.1), T.RepetitionPenaltyLogitsProcessor(1.2)],
        },
    ),
    "padding on the right": ("padding on the right or in between", {"attention_mask": LEFT.flip(1)}),
    "a hole": ("padding on the right or in between", {"attention_mask": torch.tensor([[1, 1, 0, 1, 1], [1] * 5])}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_native_generation_does_not_do_is_the_loops(variant: str) -> None:
    theirs, engine = pair()
    why, more = VARIANTS[variant]
    answers = []
    for model in (theirs, engine):
        model.generation_config.eos_token_id = 1  # transformers 4 needs one for some of them
        torch.manual_seed(3)
        rows = IDS[:1] if variant == "look-up in the prompt" else IDS
        out = model.generate(rows, **GREEDY | more)
        answers.append(out if isinstance(out, Tensor) else out.sequences)
    assert torch.equal(*answers)
    assert counts(engine) == (0, {why: 1})
    assert engine.backbones[0].calls > 0


def test_positions_and_vectors_of_the_callers_own_are_the_loops() -> None:
    theirs, engine = pair()
    vectors = torch.randn(2, 5, 48)
    for given in ({"inputs_embeds": vectors, "attention_mask": LEFT}, {"input_ids": IDS, "position_ids": LEFT * 4}):
        assert torch.equal(engine.generate(**given, **GREEDY), theirs.generate(**given, **GREEDY))
    assert counts(engine) == (0, {"inputs_embeds was given": 1, "position_ids was given": 1})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_result_is_of_the_type_that_transformers_gives(dtype: torch.dtype) -> None:
    theirs, engine = pair()
    ids = IDS.to(dtype)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            got, want = engine.module.generate(ids, **GREEDY), theirs.generate(ids, **GREEDY)
        assert torch.equal(got, want)
        assert (got.dtype, got.is_inference()) == (want.dtype, want.is_inference())
    assert counts(engine) == (3, {})


def test_settings_come_from_where_transformers_takes_them() -> None:
    theirs, engine = pair()
    config = T.GenerationConfig(**GREEDY, repetition_penalty=1.7)
    assert torch.equal(engine.generate(IDS, generation_config=config), theirs.generate(IDS, generation_config=config))
    for model in (theirs, engine.module):
        model.generation_config.update(max_new_tokens=4, pad_token_id=0, bos_token_id=2, eos_token_id=[1, 5])
    assert torch.equal(engine.generate(IDS), theirs.generate(IDS))
    assert torch.equal(engine.module.generate(), theirs.generate())  # of the beginning of any text
    assert counts(engine) == (3, {})
    with pytest.raises(ValueError, match="nonsense"):
        engine.generate(IDS, nonsense=3)


def test_a_streamer_hears_what_transformers_would_tell_it() -> None:
    class Listener(T.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.heard.append(value.tolist())

        def end(self) -> None:
            self.heard.append("end")

    theirs, engine = pair()
    for rows in (IDS[:1], IDS):
        heard = []
        for model in (theirs, engine):
            listener = Listener()
            model.generate(rows, streamer=listener, **GREEDY)
            heard.append(listener.heard)
        assert heard[0] == heard[1]
    assert counts(engine) == (1, {"a streamer for several rows": 1})


def test_revert_and_copies() -> None:
    model = build(TINY["llama"])
    names = list(model.state_dict())
    engine = hasten.init_inference(model)
    want = engine.generate(IDS, **GREEDY)
    twin = copy.deepcopy(engine.module)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0)
    assert torch.equal(twin.generate(IDS, **GREEDY), want)
    assert counts(engine) == (1, {})
    assert vars(twin)["generate"].__self__.served == 2
    assert list(model.state_dict()) == names
    engine.revert()
    assert "generate" not in vars(model)
    assert not torch.equal(model.generate(IDS, **GREEDY), want)


def test_weights_that_move_are_the_ones_that_generate() -> None:
    theirs, engine = pair()
    engine.generate(IDS, **GREEDY)
    engine.module.to(torch.float64)
    assert torch.equal(engine.generate(IDS, **GREEDY), theirs.double().generate(IDS, **GREEDY))
    assert counts(engine) == (2, {})


def test_a_model_that_somebody_changed_is_the_loops() -> None:
    class Biased(T.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits[..., 11] += 100
            return out

    model = build(TINY["llama"])
    model.__class__ = Biased
    engine = hasten.init_inference(model)
    assert (engine.generate(IDS, **GREEDY)[:, 5:] == 11).all()
    assert counts(engine) == (0, {"forward of Biased is not transformers' own": 1})

    theirs, engine = pair()
    seen: list[int] = []
    hook = engine.module.lm_head.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(engine.generate(IDS, **GREEDY), theirs.generate(IDS, **GREEDY))
    assert len(seen) == 9
    hook.remove()
    engine.module.train()
    engine.generate(IDS, **GREEDY)
    assert counts(engine) == (0, {"forward hooks": 1, "the module is in training mode": 1})


def test_what_does_not_fit_is_the_loops_and_limits_are_errors_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, engine = pair(max_out_tokens=12)
    with pytest.raises(RequestError, match="max_out_tokens=12"):
        engine.generate(IDS, **GREEDY)
    assert torch.equal(engine.module.generate(IDS, **GREEDY), theirs.generate(IDS, **GREEDY))
    assert counts(engine) == (0, {"more tokens than max_out_tokens": 1})

    theirs, engine = pair()
    monkeypatch.setattr("hasten.inject.native.Generator", partial(Generator, memory_limit=20_000))
    long = tokens("llama", (2, 60))
    assert torch.equal(engine.generate(long, **GREEDY), theirs.generate(long, **GREEDY))
    assert counts(engine) == (0, {"keys and values do not fit into the memory there is": 1})
    assert torch.equal(engine.generate(IDS, **GREEDY), theirs.generate(IDS, **GREEDY))
    assert counts(engine)[0] == 1


def test_one_caller_at_a_time_is_served_natively() -> None:
    theirs, engine = pair()
    want = theirs.generate(IDS, **GREEDY)
    stream = engine.generate([[5, 6, 7]], max_new_tokens=5, stream=True)
    next(stream)
    assert torch.equal(engine.generate(IDS, **GREEDY), want)
    assert counts(engine) == (0, {"a native stream is open": 1})
    assert len(list(stream)) == 4
    assert torch.equal(engine.generate(IDS, **GREEDY), want)

    generating = engine.generating
    assert generating is not None
    busy = threading.Thread(target=generating.native.lock.acquire)  # and never gives it back
    busy.start()
    busy.join()
    assert torch.equal(engine.generate(IDS, **GREEDY), want)
    assert counts(engine)[1]["another thread generates natively"] == 1


def test_threads_get_what_they_would_get_alone() -> None:
    theirs, engine = pair()
    want = theirs.generate(IDS, **GREEDY)
    answers: list[Tensor] = []
    threads = [threading.Thread(target=lambda: answers.append(engine.generate(IDS, **GREEDY))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(answers) == 4
    assert all(torch.equal(a, want) for a in answers)
    served, loops = counts(engine)
    assert served + sum(loops.values()) == 4
    assert set(loops) <= {"another thread generates natively"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gpt_neox", "gemma2", "qwen3_moe"])
def test_greedy_tokens_on_a_gpu_are_those_of_the_eager_model(name: str) -> None:
    theirs, engine = build(TINY[name]).cuda(), hasten.init_inference(build(TINY[name]), device="cuda")
    ids, mask = (t.cuda() for t in padded(name, "left"))
    for more in ({}, {"eos_token_id": list(range(3, 30))}, {"repetition_penalty": 1.3, "attention_mask": None}):
        how = GREEDY | {"attention_mask": mask, "max_new_tokens": 40} | more
        how = {k: v for k, v in how.items() if v is not None}
        assert torch.equal(engine.generate(ids, **how), theirs.generate(ids, **how))
    served, loops = counts(engine)
    assert served >= 2, loops


@pytest.mark.gpu
def test_draws_on_a_gpu_follow_torchs_seed_and_transformers_distribution() -> None:
    theirs, engine = build(TINY["llama"]).cuda(), hasten.init_inference(build(TINY["llama"]), device="cuda")
    ids = tokens("llama", (1, 6)).cuda()
    how: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 12, "max_new_tokens": 1, "pad_token_id": 0}
    rows = []
    for model in (engine, engine, theirs):
        torch.manual_seed(5)
        rows.append(model.generate(ids, num_return_sequences=4096, **how)[:, -1])
    assert torch.equal(rows[0], rows[1])
    assert counts(engine) == (2, {})
    ours, want = (r.bincount(minlength=67).double() / len(r) for r in rows[1:])
    assert (ours - want).abs().sum() / 2 < 0.05  # total variation of two such samples of 12 tokens: about 0.02
