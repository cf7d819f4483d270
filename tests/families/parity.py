"""What every parity test needs: a model, its twin under Hasten, inputs, and a comparison of outputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.inject.attach import attach
from hasten.inject.backbone import Backbone
from tests.tiny import TINY, build

FP32 = {"atol": 3e-5, "rtol": 3e-5}


@contextmanager
def twins(name: str) -> Iterator[tuple[PreTrainedModel, PreTrainedModel, list[Backbone]]]:
    """A tiny model, and a copy of it with its backbones replaced, which must have served every call of it."""
    theirs = build(TINY[name])
    ours = copy.deepcopy(theirs)
    backbones = attach(ours)
    for b in backbones:
        b.install()
    with torch.no_grad():
        yield theirs, ours, backbones
    for b in backbones:
        assert b.calls > 0, "the fused backbone was never called"
        assert not b.detours, f"calls went to the model's own forward: {dict(b.detours)}"


def tokens(name: str, shape: tuple[int, int]) -> Tensor:
    return torch.randint(*TINY[name].ids, shape)


def padded(name: str, side: str, rows: int = 3, width: int = 11) -> tuple[Tensor, Tensor]:
    """ids and mask, of which the second row has 4 tokens of padding, the third all but one."""
    ids, mask = tokens(name, (rows, width)), torch.ones(rows, width, dtype=torch.long)
    for row, n in ((1, 4), (2, width - 1)):
        where = slice(0, n) if side == "left" else slice(width - n, width)
        mask[row, where] = 0
    return ids, mask


def same(ours: Any, theirs: Any, where: Tensor | None = None, **tolerance: float) -> None:
    """Two outputs agree in every tensor that theirs has, at the tokens `where`."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        for a, b in zip(_flat(ours[name]), _flat(theirs[name]), strict=True):
            if where is not None and a.shape[:2] == where.shape:
                a, b = a[where], b[where]
            torch.testing.assert_close(a, b, **(tolerance or FP32), msg=lambda m, n=name: f"{n}: {m}")


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _flat(v)] if isinstance(value, tuple | list) else []


def cache_name(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache, and its outputs too: transformers renamed it. GPT takes any."""
    taken = inspect.signature(type(model).forward).parameters
    return next((n for n in ("cache", "past_key_values") if n in taken), "cache")
