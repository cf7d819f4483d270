"""GPT-like models without a language head, and with other heads, under Hasten: the same backbone, the same answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as T
from transformers import PreTrainedModel

from hasten.inject.attach import attach
from tests.families.parity import cache_name, padded, same, tokens
from tests.tiny import TINY

FAMILIES = {
    "gpt2": "GPT2",
    "gpt_neo": "GPTNeo",
    "gpt_neox": "GPTNeoX",
    "gptj": "GPTJ",
    "bloom": "Bloom",
    "opt": "OPT",
    "opt-350m": "OPT",
    "falcon": "Falcon",
    "falcon-40b": "Falcon",
    "mpt": "Mpt",
    "gpt_bigcode": "GPTBigCode",
    "starcoder2": "Starcoder2",
    "phi": "Phi",
    "stablelm": "StableLm",
}
HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
PAIRS = [(name, head) for name, prefix in FAMILIES.items() for head in HEADS if hasattr(T, prefix + head)]


def build(name: str, kind: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = TINY[name].make().config
    config.pad_token_id, config.num_labels = 0, 2 if "Question" in kind.__name__ else 3
    model = kind(config).eval()
    model.set_attn_implementation(TINY[name].attention)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def compare(theirs: PreTrainedModel, **arguments: Any) -> None:
    ours = copy.deepcopy(theirs)
    (backbone,) = attach(ours)
    assert backbone.tower.head is None
    backbone.install()
    with torch.no_grad():
        where = arguments.get("attention_mask")
        same(ours(**arguments), theirs(**arguments), None if where is None else where.bool())
    assert (backbone.calls, backbone.detours.total()) == (1, 0)


@pytest.mark.filterwarnings("ignore:.position_ids. have no functionality in BLOOM:FutureWarning")  # transformers 4
@pytest.mark.parametrize(("name", "head"), PAIRS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(name: str, head: str, side: str) -> None:
    model = build(name, getattr(T, FAMILIES[name] + head))
    ids, mask = padded(name, side)
    compare(model, input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask, output_hidden_states=True)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # where the base model wraps
@pytest.mark.parametrize("spelling", ["its name", "past_key_values"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_base_model_gives_a_cache_that_goes_on_under_its_older_name_too(name: str, spelling: str) -> None:
    theirs = build(name, getattr(T, f"{FAMILIES[name]}Model"))
    ours = copy.deepcopy(theirs)
    for b in attach(ours):
        b.install()
    ids = tokens(name, (2, 8))
    with torch.no_grad():
        want = theirs(ids, use_cache=False).last_hidden_state[:, 5:]
        kept = cache_name(ours)
        cache = ours(ids[:, :5], use_cache=True)[kept]
        spelling = kept if spelling == "its name" else spelling
        got = ours(ids[:, 5:], use_cache=True, **{spelling: cache}).last_hidden_state
    torch.testing.assert_close(got, want, atol=3e-5, rtol=3e-5)


def test_both_heads_of_gpt2_at_once() -> None:
    model = build("gpt2", T.GPT2DoubleHeadsModel)
    ours = copy.deepcopy(model)
    (backbone,) = attach(ours)
    backbone.install()
    ids = tokens("gpt2", (6, 7)).view(2, 3, 7)  # three choices each
    ends = torch.tensor([[6, 4, 2], [1, 6, 0]])
    with torch.no_grad():
        same(ours(ids, mc_token_ids=ends), model(ids, mc_token_ids=ends))
    assert dict(backbone.detours) == {"input_ids have more than two axes": 1}
