"""What one family of models says about itself: how to describe it, where its weights are, where its backbone sits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hasten.spec import Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

Kind = Literal["decoder", "encoder", "seq2seq-encoder", "seq2seq-decoder", "image", "audio", "megatron"]


@dataclass(frozen=True, slots=True)
class Seam:
    """Where a live model's backbone sits and what its call means.

    path: below the model's base model (transformers' `base_model`), "" for itself; the first that exists is taken.
    keeps: submodules of the backbone that the model goes on using itself (a pooler runs behind the blocks).
    states: whether the last of `hidden_states` is taken behind the final norm or before it.
    """

    kind: Kind
    path: tuple[str, ...] = ("",)
    keeps: tuple[str, ...] = ()
    pooler: str | None = None  # submodule that makes `pooler_output` from the last hidden state
    states: Literal["normed", "raw"] = "normed"


@dataclass(frozen=True, slots=True)
class Family:
    """`describe` gives a tower per name in `dialects` and `seams`; a model without heads gets towers without them."""

    describe: Callable[[Config], Mapping[str, Tower]]
    dialects: Mapping[str, tuple[Dialect, ...]]
    seams: Mapping[str, Seam]
    classes: str = ""  # what users know it as, for the table of models


def one(describe: Callable[[Config], Tower], *dialects: Dialect, seam: Seam, classes: str = "") -> Family:
    """A family with a single tower."""
    return Family(lambda c: {"": describe(c)}, {"": dialects}, {"": seam}, classes)
