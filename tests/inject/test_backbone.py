"""How a backbone reads a call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hasten.inject.backbone import Attributes, Spelling

CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((1,), {}),
    ((1, 2), {}),
    ((1, 2, 3, 4, 5), {}),
    ((1,), {"b": 2}),
    ((1,), {"a": 2}),
    ((), {"b": 2}),
    ((), {"a": 1, "c": None}),
    ((1,), {"z": 3}),
    ((1,), {"more": 3}),
]
FORWARDS: list[Callable[..., Any]] = [
    lambda a, b=None, *, c=3: None,
    lambda a, b=None, *, c: None,
    lambda a=None, b=None, **more: None,
    lambda a, /, b=None: None,
    lambda a, *b, c=None: None,
    lambda **more: None,
]


def bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `inspect` says, with gathered keywords beside the others; the words of a TypeError where it has one."""
    try:
        found = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        return str(error)
    for n, p in signature.parameters.items():
        if p.kind is p.VAR_KEYWORD:
            found.update(found.pop(n, {}))
    return found


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: str(inspect.signature(f)))
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_arguments_are_bound_as_python_binds_them(forward: Callable[..., Any], call: Any) -> None:
    signature = inspect.signature(forward)
    want = bound(signature, *call)
    if isinstance(want, str):
        with pytest.raises(TypeError) as caught:
            Spelling(signature)(*call)
        assert str(caught.value) == want
    else:
        assert Spelling(signature)(*call) == want


def test_an_attribute_is_found_in_modules_and_in_their_copies() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    model.__dict__["held"] = Attributes(list(model))
    twin = copy.deepcopy(model)
    assert not model.held.any("forward")
    twin[1].forward = lambda x: x
    assert twin.held.any("forward") and not model.held.any("forward")
    del twin[1].forward
    model[0].forward = lambda x: x
    assert model.held.any("forward") and not twin.held.any("forward")
