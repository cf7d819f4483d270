"""Encoders under Hasten give what transformers gives."""

from __future__ import annotations

import pytest
import torch

from tests.families.parity import padded, same, tokens, twins
from tests.tiny import TINY

ENCODERS = [n for n, t in TINY.items() if t.kind == "encoder"]
every = pytest.mark.parametrize("name", ENCODERS)


@every
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_outputs_and_hidden_states_of_a_batch(name: str, side: str) -> None:
    with twins(name) as (theirs, ours, _):
        ids, mask = padded(name, side) if side != "none" else (tokens(name, (2, 9)), None)
        arguments = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
        where = None if mask is None else mask.bool()
        a, b = dict(ours(**arguments)), dict(theirs(**arguments))
        if where is not None:  # what is pooled from a token of padding means nothing
            a.pop("pooler_output", None)
            b.pop("pooler_output", None)
        same(a, b, where)


@every
def test_one_token_token_types_and_padding_ids(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        ids = tokens(name, (1, 1))
        same(ours(ids), theirs(ids))
        ids = tokens(name, (2, 7))
        if theirs.config.pad_token_id is not None:
            ids[1, 5:] = theirs.config.pad_token_id
        arguments = {"input_ids": ids}
        if getattr(theirs.config, "type_vocab_size", 0) > 1:
            arguments["token_type_ids"] = torch.randint(0, 2, ids.shape)
        same(ours(**arguments), theirs(**arguments))


@every
def test_a_tuple_where_one_is_wanted(name: str) -> None:
    with twins(name) as (theirs, ours, _):
        ids = tokens(name, (2, 5))
        a, b = ours(ids, return_dict=False), theirs(ids, return_dict=False)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=3e-5, rtol=3e-5)
