"""What transformers prepares for its loop is read as it means it, or declined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

from hasten.inject.decoding import Declined, Prompts, read_prompts, read_sampling
from hasten.runtime import Sampling
from tests.tiny import TINY, build

IDS = torch.tensor([[9, 8, 40, 4, 33], [5, 6, 7, 21, 17]])
LEFT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def prepared(model: T.PreTrainedModel, **how: Any) -> Sampling | str:
    """What is read from that which transformers prepares for its loop."""
    found: list[Sampling | str] = []

    def stand_in(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
    ) -> Tensor:
        try:
            prompts = read_prompts(input_ids, None)
            found.append(read_sampling(generation_config, logits_processor, stopping_criteria, prompts))
        except Declined as why:
            found.append(str(why))
        return input_ids

    model.generate(IDS, custom_generate=stand_in, pad_token_id=0, **how)
    return found[0]


def test_draws_are_read_as_transformers_would_filter_them() -> None:
    model = build(TINY["llama"])
    model.generation_config.eos_token_id = [1, 2]
    common: dict[str, Any] = {"stop_tokens": [1, 2], "ignore_eos": True}
    assert prepared(model, do_sample=True, top_k=7, max_new_tokens=3) == Sampling(3, temperature=1.0, top_k=7, **common)
    got = prepared(model, do_sample=True, temperature=0.5, top_k=0, top_p=0.25, max_length=9, min_length=7)
    assert got == Sampling(4, 2, 0.5, top_p=0.25, **common)
    got = prepared(model, do_sample=True, top_k=None, min_p=0.125, repetition_penalty=1.5, max_new_tokens=3)
    assert got == Sampling(
        3, temperature=1.0, top_k=0 if got.top_k == 0 else 50, min_p=0.125, repetition_penalty=1.5, **common
    )
    assert prepared(model, do_sample=True, min_p=0.1, top_p=0.9, max_new_tokens=3) == "top_p in front of min_p"
    assert prepared(model, do_sample=True, typical_p=0.9, max_new_tokens=3) == "TypicalLogitsWarper"
    own = [T.TopPLogitsWarper(0.5)]  # in front of the temperature
    assert prepared(model, do_sample=True, temperature=0.5, top_k=0, logits_processor=own, max_new_tokens=3) == (
        "logits processors in an order of their own"
    )
    own = [T.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=2)]
    assert prepared(model, logits_processor=own, max_new_tokens=3) == "RepetitionPenaltyLogitsProcessor"
    kept = [T.TopPLogitsWarper(0.5, min_tokens_to_keep=2)]
    assert prepared(model, do_sample=True, top_k=0, logits_processor=kept, max_new_tokens=3) == "TopPLogitsWarper"


def test_prompts_are_the_rows_without_their_padding() -> None:
    assert read_prompts(IDS, LEFT) == Prompts([[9, 8, 40, 4, 33], [7, 21, 17]], [0, 2], 5)
    assert read_prompts(IDS, LEFT.bool()).padded
    assert not read_prompts(IDS, torch.ones_like(IDS)).padded
    with pytest.raises(Declined):
        read_prompts(IDS, torch.tensor([[1] * 5, [0] * 5]))
