"""What goes wrong on one of several ranks is said on all of them, and every model is as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hasten
from hasten.errors import HastenError, RequestError
from hasten.inject.cast import Cast
from hasten.inject.loan import Loan
from hasten.weights import Binding
from tests.parallel import ranks
from tests.tiny import TINY, build

IDS = torch.tensor([[5, 9, 30]])


@torch.no_grad()
def short_of_memory(name: str, after: int | None, given: dict[str, Any]) -> str:
    """What is said where rank 1 has no room after so many tensors, or for the cast (None); the model is as before."""
    model = build(TINY[name])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    want, take, cast, left = model(input_ids=IDS)[0], Loan._take, Cast.apply, after

    def short(self: Loan, b: Binding, tensors: Mapping[str, Tensor]) -> None:
        nonlocal left
        left = None if left is None else left - 1
        if left == -1 and dist.get_rank() == 1:
            raise MemoryError("on purpose")
        take(self, b, tensors)

    def uncast(self: Cast) -> None:
        if after is None and dist.get_rank() == 1:
            raise MemoryError("on purpose")
        cast(self)

    Loan._take, Cast.apply = short, uncast
    try:
        hasten.init_inference(model, mp_size=dist.get_world_size(), **given)
    except (MemoryError, HastenError) as error:
        said = str(error)
    else:
        return "accepted"
    finally:
        Loan._take, Cast.apply = take, cast
    after_it = model.state_dict()
    assert all(torch.equal(v, after_it[k]) and after_it[k].is_contiguous() for k, v in before.items())
    assert all(not {"_hasten", "generate", "forward"} & vars(m).keys() for m in model.modules())
    assert torch.equal(model(input_ids=IDS)[0], want)
    return said


@pytest.mark.parametrize(
    ("name", "after", "given"),
    [
        ("bloom", 0, {}),
        ("bloom", 9, {"dtype": torch.bfloat16, "keep_originals": True}),
        ("llama", 14, {}),
        ("llama", None, {"dtype": torch.bfloat16, "keep_originals": True}),
    ],
)
def test_a_rank_that_fails_while_it_takes_its_share(name: str, after: int | None, given: dict[str, Any]) -> None:
    first, second = ranks.run(2, short_of_memory, name, after, given)
    assert second == "on purpose"
    assert "taking a share of the model failed elsewhere, so rank 0 of 2 gave it up too" in first
    assert first.endswith("rank 1: MemoryError: on purpose")


@torch.no_grad()
def mixed(name: str, first: bool) -> tuple[str, bool]:
    """What is said where a cache goes on elsewhere than where it began, and whether new ones serve afterwards.

    first: it begins in the fused backbone, and not in the model's own forward.
    """
    model = build(TINY[name])
    want = model(input_ids=IDS)[0]
    engine = hasten.init_inference(model, mp_size=dist.get_world_size())
    ids = IDS.to(model.device)
    cache = engine(ids, use_cache=True, output_attentions=not first).past_key_values
    try:
        engine(ids, past_key_values=cache, use_cache=True, output_attentions=first)
    except RequestError as error:
        said = str(error)
    else:
        said = "accepted"
    cache = engine(ids[:, :2], use_cache=True).past_key_values
    last = engine(ids[:, 2:], past_key_values=cache, use_cache=True)[0].cpu()
    return said, torch.allclose(last[:, -1], want[:, -1], atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_cache_of_one_ranks_heads_and_the_models_own_forward(first: bool) -> None:
    held, needed = ("1", "2") if first else ("2", "1")
    for said, well in ranks.run(2, mixed, "llama", first):
        assert f"the cache holds {held} key-value heads, and this call needs {needed} in every layer" in said
        assert "Begin with a new cache" in said and ("(output_attentions)" in said) is first
        assert well


def test_heads_that_every_rank_has_go_on_with_each_other() -> None:
    for said, well in ranks.run(2, mixed, "falcon", True):  # one key-value head, which no rank divides
        assert (said, well) == ("accepted", True)
