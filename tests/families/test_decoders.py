"""Decoders under Hasten give what transformers gives: logits, states, caches and generated tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.families.parity import cache_name, padded, same, tokens, twins
from tests.tiny import TINY

DECODERS = [n for n, t in TINY.items() if t.kind == "decoder"]
every = pytest.mark.parametrize("name", DECODERS)
LENGTHS = {"max_new_tokens": 14, "min_new_tokens": 14, "pad_token_id": 0}


@every
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_hidden_states_of_a_batch(name: str, side: str) -> None:
    with twins(name) as (theirs, ours, _):
        ids, mask = padded(name, side) if side != "none" else (tokens(name, (2, 9)), None)
        arguments = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
        same(ours(**arguments), theirs(**arguments), None if mask is None else mask.bool())


@every
def test_one_token_and_vectors_instead_of_ids(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        ids = tokens(name, (1, 1))
        same(ours(ids, use_cache=False), theirs(ids, use_cache=False))
        vectors = torch.randn(2, 5, theirs.get_input_embeddings().weight.shape[1])
        same(ours(inputs_embeds=vectors, use_cache=False), theirs(inputs_embeds=vectors, use_cache=False))


@every
def test_a_cache_passed_by_hand_in_pieces(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        ids = tokens(name, (2, 13))
        name = cache_name(theirs)
        caches = DynamicCache(config=theirs.config), DynamicCache(config=ours.config)
        for piece in (ids[:, :4], ids[:, 4:5], ids[:, 5:12], ids[:, 12:]):
            a = theirs(piece, use_cache=True, **{name: caches[0]})
            b = ours(piece, use_cache=True, **{name: caches[1]})
            torch.testing.assert_close(b.logits, a.logits, atol=3e-5, rtol=3e-5)
        assert caches[1].get_seq_length() == caches[0].get_seq_length()


@every
@pytest.mark.parametrize("how", ["greedy", "beams", "static cache", "sampled"])
def test_generate_on_a_padded_batch(name: str, how: str) -> None:
    extra = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "static cache": {"cache_implementation": "static"},
        "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    }[how]
    if how == "static cache" and TINY[name].static is None:
        pytest.skip("transformers has no static cache for it")
    with twins(name) as (theirs, ours, _):
        ids, mask = padded(name, "left")
        if not TINY[name].left_padding:
            mask = torch.ones_like(mask)
        answers = []
        fair = {} if how == "static cache" and not TINY[name].static else extra
        for model, chosen in ((theirs, fair), (ours, extra)):
            torch.manual_seed(1)
            arguments = {"do_sample": False, **LENGTHS, **chosen}
            answers.append(model.generate(ids, attention_mask=mask, **arguments))
        assert torch.equal(*answers)
