"""What one family of models says about itself: how to describe it, where its weights are, where its backbone sits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from hasten.spec import Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["decoder", "encoder", "seq2seq-encoder", "seq2seq-decoder", "image", "audio", "megatron"]


@dataclass(frozen=True, slots=True)
class Seam:
    """Where a live model's backbone sits and what its call means.

    path: below the model's base model (transformers' `base_model`), "" for itself; the first that exists is taken.
    keeps: submodules of the backbone that stay in use as they are (a pooler runs behind the blocks); `*` is any name.
    states: whether the last of `hidden_states` is taken behind the final norm or before it; "either": before it where
    the forward lists them itself (transformers 4), behind it where transformers records them (5).
    windows: whether a mask of four axes already has them, or the attention applies them beside every mask (GPT-Neo).
    """

    kind: Kind
    path: tuple[str, ...] = ("",)
    keeps: tuple[str, ...] = ()
    pools: Literal["all", "first", "last", "eos"] | None = None  # the tokens of which `pooler_output` is made, if it is
    pooler: tuple[str, ...] = ()  # submodules that make it, one behind the other
    stem: tuple[str, ...] = ()  # submodules that make an image's first hidden state, one behind the other
    biases: tuple[str, ...] = ()  # submodules that make the bias of block {i}'s scores from an image's size (BEiT)
    states: Literal["normed", "raw", "either"] = "normed"
    windows: Literal["in masks", "beside masks"] = "in masks"

    def kept(self, name: str) -> bool:
        """Whether a submodule or parameter of the backbone is one of `keeps` or inside one."""
        return any(fnmatchcase(name, k) or fnmatchcase(name, f"{k}.*") for k in self.keeps)


def transformers_config(model: nn.Module) -> Config:
    """A reader over the `config` of a model of transformers."""
    config: Any = model.config
    return Config(config.to_dict(), f"{type(config).__name__} of {type(model).__name__}")


@dataclass(frozen=True, slots=True)
class Family:
    """`describe` gives a tower per name in `dialects` and `seams`; a model without heads gets towers without them.

    read: finds the config of a live model.
    """

    describe: Callable[[Config], Mapping[str, Tower]]
    dialects: Mapping[str, tuple[Dialect, ...]]
    seams: Mapping[str, Seam]
    classes: str = ""  # what users know it as, for the table of models
    read: Callable[[nn.Module], Config] = transformers_config


def one(describe: Callable[[Config], Tower], *dialects: Dialect, seam: Seam, classes: str = "") -> Family:
    """A family with a single tower."""
    return Family(lambda c: {"": describe(c)}, {"": dialects}, {"": seam}, classes)
