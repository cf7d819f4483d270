"""Vision transformers."""

from __future__ import annotations

from tests.tiny.model import Tiny

TINY: dict[str, Tiny] = {}
