"""Padding is computed as transformers computes it, unless it is asked to be left out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import hasten
from tests.tiny import TINY, build

ENCODERS = ("bert-pooled", "roberta", "distilbert", "albert", "electra")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Padding on both sides, and a row without any."""
    ids, mask = torch.randint(3, 40, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, 4:], mask[1, :6] = 0, 0
    return ids, mask


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", [n for n in ENCODERS if n in TINY])
def test_real_tokens_are_the_same_and_padding_is_zero_only_if_skipped(name: str, skip: bool) -> None:
    theirs: Any = build(TINY[name]).base_model
    engine = hasten.init_inference(copy.deepcopy(theirs), skip_padding=skip)
    ids, mask = batch()
    with torch.no_grad():
        want, got = (m(ids, attention_mask=mask).last_hidden_state for m in (theirs, engine))
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=3e-5, atol=3e-5)
    if skip:
        assert not got[~real].any()
    else:
        torch.testing.assert_close(got, want, rtol=3e-5, atol=3e-5)
