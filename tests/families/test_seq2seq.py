"""Encoder-decoders under Hasten give what transformers gives: logits, states, caches, generated tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.families.parity import cache_name, padded, same, tokens, twins
from tests.tiny import TINY

TEXT = [n for n, t in TINY.items() if t.kind == "seq2seq"]
SPEECH = [n for n, t in TINY.items() if t.kind == "speech"]
LENGTHS = {"max_new_tokens": 12, "min_new_tokens": 12}


def source(name: str, side: str) -> dict[str, Any]:
    if name in SPEECH:
        return {"input_features": torch.randn(3, 8, 32)}
    ids, mask = padded(name, side)
    mask[2] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", TEXT + SPEECH)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_hidden_states_of_a_batch(name: str, side: str) -> None:
    with twins(name) as (theirs, ours, _):
        given = source(name, side)
        decoder = tokens(name, (3, 6))
        more = {"decoder_input_ids": decoder, "output_hidden_states": True, "use_cache": False}
        a, b = dict(ours(**given, **more)), dict(theirs(**given, **more))
        where = given["attention_mask"].bool() if "attention_mask" in given else None
        same(a, b, where)


@pytest.mark.parametrize("name", TEXT + SPEECH)
def test_a_padded_decoder_and_one_token(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        given = source(name, "right")
        ids, mask = padded(name, "right", width=7)
        more = {"decoder_input_ids": ids, "decoder_attention_mask": mask, "use_cache": False}
        a, b = ours(**given, **more).logits, theirs(**given, **more).logits
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=3e-5, rtol=3e-5)
        one = tokens(name, (3, 1))
        a, b = (m(**given, decoder_input_ids=one).logits for m in (ours, theirs))
        torch.testing.assert_close(a, b, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("name", TEXT + SPEECH)
def test_a_cache_passed_by_hand(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        given, ids, kept = source(name, "right"), tokens(name, (3, 8)), cache_name(theirs)
        answers = []
        for model in (theirs, ours):
            encoded, cache, logits = model.get_encoder()(**given), None, []
            rest = {k: v for k, v in given.items() if k == "attention_mask"}
            for piece in (ids[:, :3], ids[:, 3:4], ids[:, 4:]):
                rest[kept] = cache
                out = model(encoder_outputs=encoded, decoder_input_ids=piece, use_cache=True, **rest)
                cache = out[kept]
                logits.append(out.logits)
            answers.append(torch.cat(logits, 1))
        torch.testing.assert_close(answers[1], answers[0], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("name", TEXT + SPEECH)
@pytest.mark.parametrize("how", ["greedy", "beams", "static cache", "sampled"])
def test_generate_on_a_padded_batch(name: str, how: str) -> None:
    extra = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "static cache": {"cache_implementation": "static"},
        "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    }[how]
    if how == "sampled" and name == "m2m_100" and transformers.__version__ < "5":
        pytest.skip("its layers draw a random number each, for a layer drop that eval does not do")
    with twins(name) as (theirs, ours, _):
        given, answers = source(name, "right"), []
        for model in (theirs, ours):
            torch.manual_seed(1)
            answers.append(model.generate(**given, **{"do_sample": False, **LENGTHS, **extra}))
        assert torch.equal(*answers)
