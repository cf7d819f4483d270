"""A stack of blocks between an embedding and, perhaps, a head: everything a model computes, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hasten.spec.block import Block, Norm


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer between a narrow embedding and the tower (OPT-350m, ELECTRA, ALBERT)."""

    bias: bool
    after: Literal["tokens", "norm"]  # before positions are added, or behind the embedding's norm
    back: bool  # the mirror image, without bias, behind the last block


@dataclass(frozen=True, slots=True)
class Tokens:
    vocab: int
    width: int
    positions: int | None = None  # rows of the table of absolute positions
    position_offset: int = 0  # rows of it that position 0 skips (OPT, BART: 2)
    counted: Literal["all", "mask", "ids"] = "all"  # which tokens take a position where the caller gives none
    padding: int | None = None  # the id that "ids" does not count (RoBERTa)
    types: int = 0  # rows of the token type table
    norm: Norm | None = None
    scale: float = 1.0  # multiplies the token's vector
    scale_rounded: bool = False  # ... and is rounded to the vector's dtype first (Gemma)
    projection: Projection | None = None


@dataclass(frozen=True, slots=True)
class Patches:
    """An image cut into squares. The source model's own embedding makes vectors of them: the tower starts behind it."""

    patch: tuple[int, int]  # height, width
    image: tuple[int, int]  # height, width that the model was made for
    channels: int


@dataclass(frozen=True, slots=True)
class Frames:
    """A spectrogram through two convolutions of width 3, the second of stride 2 (Whisper)."""

    mels: int
    positions: int
    norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Head:
    tied: bool  # uses the token table
    bias: bool = False
    scale: float = 1.0  # multiplies the hidden state
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Tower:
    width: int
    embed: Tokens | Patches | Frames
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    head: Head | None = None

    @property
    def causal(self) -> bool:
        return any(b.attention.causal for b in self.blocks)

    @property
    def kv_width(self) -> int:
        """Numbers that one token leaves in the key-value cache, over all blocks."""
        return sum(2 * b.attention.kv_width for b in self.blocks)
