"""Tiny random models of every family, small and awkward, with no bias or norm that is a no-op."""

from __future__ import annotations

from tests.tiny import decoders, encoders, experts, images, llamas, megatron, seq2seq
from tests.tiny.model import Tiny, build

TINY: dict[str, Tiny] = {
    **llamas.TINY,
    **experts.TINY,
    **decoders.TINY,
    **encoders.TINY,
    **images.TINY,
    **seq2seq.TINY,
    **megatron.TINY,
}

__all__ = ["TINY", "Tiny", "build"]
