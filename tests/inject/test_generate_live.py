"""generate() and calls of a live model, in all the ways that users have, give what they gave before."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

import hasten
from tests.families.parity import cache_name, same
from tests.inject.vocabulary import words
from tests.tiny import TINY, build

NEW = int(T.__version__.split(".")[0]) >= 5
DECODERS = ["llama", "gpt2", "gpt_neox", "bloom"]
SEQ2SEQ = ["t5", "bart"]
LENGTHS = {"max_new_tokens": 9, "min_new_tokens": 9, "pad_token_id": 0}
GREEDY = {"do_sample": False, **LENGTHS}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, **LENGTHS}
WHOLE = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
IDS = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 40, 4, 33]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
FP32 = {"atol": 3e-5, "rtol": 3e-5}

decoders = pytest.mark.parametrize("name", DECODERS)


class Never(T.LogitsProcessor):
    """Forbids one token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([11]), -torch.inf)


class Until(T.StoppingCriteria):
    """Stops each row once it has `count` tokens, one earlier for the first row."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        due = torch.tensor([self.count - 1, self.count])
        return input_ids.shape[1] >= due[: len(input_ids)]


VARIANTS: dict[str, dict[str, Any]] = {
    "several sequences, sampled": SAMPLED | {"num_return_sequences": 3},
    "several sequences, beams": GREEDY | {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.7},
    "beams that stop early": GREEDY | {"num_beams": 3, "early_stopping": True, "min_new_tokens": None},
    "beams, sampled": SAMPLED | {"num_beams": 3},
    "penalties": GREEDY | {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.1},
    "forbidden words": GREEDY | {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [12, 13]},
    "filters": SAMPLED | {"top_p": 0.9, "min_p": 0.02, "typical_p": 0.95},
    "scores": GREEDY | WHOLE,
    "scores of beams": GREEDY | WHOLE | {"num_beams": 3},
    "hidden states": GREEDY | {"return_dict_in_generate": True, "output_hidden_states": True},
    "no cache": GREEDY | {"use_cache": False},
    "no cache, sampled": SAMPLED | {"use_cache": False},
    "guidance": GREEDY | {"guidance_scale": 1.7},
    "a processor": GREEDY | {"logits_processor": T.LogitsProcessorList([Never()])},
    "stopping criteria": GREEDY | {"stopping_criteria": T.StoppingCriteriaList([Until(9)]), "min_new_tokens": None},
    "prompt in chunks": GREEDY | {"prefill_chunk_size": 2},
    "an end token": {"do_sample": False, "max_new_tokens": 20, "eos_token_id": list(range(3, 30)), "pad_token_id": 0},
}


@decoders
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_generate(name: str, variant: str) -> None:
    if (name, variant) == ("bloom", "prompt in chunks") and not NEW:
        pytest.skip("transformers 4 fails at it by itself")
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    given = {"input_ids": IDS + 3} if variant == "hidden states" else BATCH  # those of padding mean nothing
    results = []
    for model in (theirs, engine):
        torch.manual_seed(0)
        results.append(model.generate(**given, **VARIANTS[variant]))
    equal(results[1], results[0])
    served(engine)


@pytest.mark.parametrize("variant", ["several sequences, beams", "penalties", "scores", "no cache", "hidden states"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_variant_of_generate_by_encoder_decoders(name: str, variant: str) -> None:
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    equal(engine.generate(**BATCH, **VARIANTS[variant]), theirs.generate(**BATCH, **VARIANTS[variant]))
    served(engine)


@decoders
def test_a_conversation_goes_on_from_its_cache(name: str) -> None:
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    answers, kept = [], cache_name(theirs)
    for model in (theirs, engine):
        ids = IDS[1:]
        cache = T.DynamicCache(config=model.config)
        for more in ([17, 3], [21], [50, 51, 52]):
            out = model.generate(ids, return_dict_in_generate=True, **GREEDY, **{kept: cache})
            cache = out[kept]
            ids = torch.cat([out.sequences, torch.tensor([more])], 1)
        answers.append(ids)
        fresh = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, **GREEDY, **{kept: cache}), fresh)
    assert torch.equal(*answers)
    served(engine)


@decoders
@pytest.mark.parametrize("helper", ["a model", "an engine", "the prompt"])
def test_assisted_generation(name: str, helper: str) -> None:
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    small = build(TINY[name])
    with torch.no_grad():
        for p in small.parameters():
            p.add_(torch.randn_like(p) * 0.02)  # often of the same opinion, not always
    for model in (theirs, engine, small):
        model.generation_config.eos_token_id = 1  # transformers 4 needs one here
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}
    alone = theirs.generate(IDS[1:], **how)
    how |= {"prompt_lookup_num_tokens": 3} if helper == "the prompt" else {"assistant_model": small}
    want = theirs.generate(IDS[1:], **how)
    assert torch.equal(want[:, :14], alone)  # transformers 4 may run over by one
    assistant = hasten.init_inference(small) if helper == "an engine" else None
    how |= {} if assistant is None else {"assistant_model": assistant}
    assert torch.equal(engine.generate(IDS[1:], **how), want)
    served(engine)
    if assistant is not None:
        served(assistant)


def test_text_streams_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    theirs, engine, tokenizer = build(TINY["llama"]), hasten.init_inference(build(TINY["llama"])), words()
    texts = []
    for model in (theirs, engine):
        model.generate(IDS[1:], streamer=T.TextStreamer(tokenizer), **GREEDY)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0].split()) == 14

    streamer = T.TextIteratorStreamer(tokenizer, timeout=60)
    thread = threading.Thread(target=engine.generate, args=(IDS[1:],), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    assert "".join(streamer).strip() == texts[0].strip()
    thread.join()
    served(engine)


@decoders
def test_generate_from_vectors(name: str) -> None:
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    vectors = torch.randn(2, 5, theirs.get_input_embeddings().weight.shape[1])
    given = {"inputs_embeds": vectors, "attention_mask": MASK}
    for how in (GREEDY, GREEDY | {"num_beams": 3}, GREEDY | {"use_cache": False}):
        assert torch.equal(engine.generate(**given, **how), theirs.generate(**given, **how))
    served(engine)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_an_encoders_output_passed_by_hand(name: str) -> None:
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    with torch.no_grad():
        results = []
        for model in (theirs, engine):
            states = model.get_encoder()(**BATCH)
            made = model.generate(encoder_outputs=states, attention_mask=MASK, **GREEDY)
            seen = model(encoder_outputs=states, attention_mask=MASK, decoder_input_ids=IDS)
            listed = model(encoder_outputs=(states[0],), attention_mask=MASK, decoder_input_ids=IDS)
            results.append((made, seen.logits, listed.logits))
    equal(results[1], results[0])
    served(engine)


@decoders
@pytest.mark.parametrize("with_cache", [False, True])
def test_masks_of_four_axes(name: str, with_cache: bool) -> None:
    if name == "bloom":
        pytest.skip("BLOOM makes its positions of a mask of two axes")
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    ids = torch.randint(3, 60, (2, 7))
    seen = (torch.rand(2, 1, 7, 7) > 0.4).tril() | torch.eye(7, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        for mask in (seen, added):
            got = engine(input_ids=ids, attention_mask=mask, use_cache=with_cache).logits
            want = theirs(input_ids=ids, attention_mask=mask, use_cache=with_cache).logits
            torch.testing.assert_close(got, want, **FP32)
        assert (want - theirs(ids).logits).abs().max() > 1e-3
    served(engine)


@pytest.mark.skipif(not NEW, reason="transformers 4 takes none")
@pytest.mark.parametrize("name", ["bert", "distilbert", "t5", "bart"])
def test_masks_of_four_axes_for_both_directions(name: str) -> None:
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    ids = torch.randint(3, 60, (2, 7))
    seen = (torch.rand(2, 1, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        for mask in (seen, added):
            calls = [m.get_encoder() if name in SEQ2SEQ else m.base_model for m in (theirs, engine)]
            want, got = (call(input_ids=ids, attention_mask=mask)[0] for call in calls)
            torch.testing.assert_close(got, want, **FP32)
    served(engine, encoder_only=True)


@decoders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32], ids=str)
def test_a_mask_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    given = {"input_ids": IDS, "attention_mask": MASK.to(dtype)}
    with torch.no_grad():
        got, want = engine(**given).logits, theirs(**given).logits
    torch.testing.assert_close(got[MASK.bool()], want[MASK.bool()], **FP32)
    assert torch.equal(engine.generate(**given, **GREEDY), theirs.generate(**given, **GREEDY))
    served(engine)


POSITIONS = {
    "shifted": torch.tensor([[3, 4, 5, 6, 7], [20, 21, 22, 23, 24]]),
    "one row for all": torch.tensor([[2, 3, 4, 5, 6]]),
    "with gaps": torch.tensor([[0, 2, 3, 7, 8], [1, 2, 3, 4, 30]]),
    "two texts packed into a row": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]),
}


@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("case", POSITIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_positions_passed_by_hand(name: str, case: str, with_cache: bool) -> None:
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    given = {"input_ids": IDS, "position_ids": POSITIONS[case], "use_cache": with_cache}
    with torch.no_grad():
        torch.testing.assert_close(engine(**given).logits, theirs(**given).logits, **FP32)
        given |= {"attention_mask": torch.ones_like(IDS)}
        torch.testing.assert_close(engine(**given).logits, theirs(**given).logits, **FP32)
    apart = case in ("with gaps", "two texts packed into a row") and not with_cache
    assert engine.backbones[0].detours == ({"position_ids jump within a row": 1} if apart else {})


@decoders
def test_attentions_come_from_the_models_own_forward(name: str) -> None:
    theirs, ours = build(TINY[name]), build(TINY[name])
    for model in (theirs, ours):
        model.set_attn_implementation("eager")
    engine = hasten.init_inference(ours)
    with torch.no_grad():
        got, want = engine(**BATCH, output_attentions=True), theirs(**BATCH, output_attentions=True)
    assert len(got.attentions) == len(want.attentions) == len(engine.backbones[0].tower.blocks)
    equal(got.attentions, want.attentions)
    torch.testing.assert_close(got.logits[MASK.bool()], want.logits[MASK.bool()], **FP32)
    assert engine.backbones[0].detours == {"output_attentions": 1}
    how = GREEDY | {"return_dict_in_generate": True, "output_attentions": True}
    equal(engine.generate(**BATCH, **how), theirs.generate(**BATCH, **how))
    assert engine.backbones[0].calls == 0
    with torch.no_grad():
        torch.testing.assert_close(engine(IDS).logits, theirs(IDS).logits, **FP32)
    assert engine.backbones[0].calls == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_generation_config_says_how(name: str) -> None:
    theirs, engine = build(TINY[name]), hasten.init_inference(build(TINY[name]))
    config = T.GenerationConfig(**GREEDY, num_beams=2, decoder_start_token_id=0 if name == "t5" else None)
    want = theirs.generate(IDS, generation_config=config)
    assert torch.equal(engine.generate(IDS, generation_config=config), want)
    assert torch.equal(engine.generate(IDS, config), want)
    for model in (theirs, engine.module):
        model.generation_config.update(max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    assert torch.equal(engine.generate(IDS), theirs.generate(IDS))
    served(engine)


def equal(got: Any, want: Any) -> None:
    """Token ids equal, numbers close, field by field."""
    match want:
        case Tensor() if want.is_floating_point():
            torch.testing.assert_close(got, want, **FP32)
        case Tensor():
            assert torch.equal(got, want)
        case tuple() | list():
            for g, w in zip(got, want, strict=True):
                equal(g, w)
        case _:
            if "sequences" in want:
                assert torch.equal(got.sequences, want.sequences)
            same(got, want)


def served(engine: hasten.InferenceEngine, encoder_only: bool = False) -> None:
    """Every call of the backbones was answered by the fused ones, or natively on their weights."""
    natively = engine.generating is not None and engine.generating.served > 0
    for b in engine.backbones:
        assert b.calls > 0 or natively or (encoder_only and b.seam.kind == "seq2seq-decoder")
        assert not b.detours, dict(b.detours)
