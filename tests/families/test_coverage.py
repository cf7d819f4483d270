"""No model type is listed without a tiny model that the parity tests run."""

from __future__ import annotations

from hasten.families import FAMILIES
from tests.tiny import TINY

LIVE = {f"megatron_{side}{version}" for side in ("gpt", "bert") for version in ("", "-v1", "-v0")}
"""Modules of Megatron-LM, which have no transformers class: tests/families/test_megatron.py has them."""


def test_every_family_has_a_tiny_model() -> None:
    tested: set[str] = set()
    for tiny in TINY.values():
        config = tiny.make().config
        tested |= {config.model_type, *(getattr(v, "model_type", "") for v in vars(config).values())}
    assert sorted(FAMILIES.keys() - tested - LIVE) == []


def test_there_are_at_least_as_many_model_types_as_promised() -> None:
    assert len(FAMILIES.keys() - LIVE) >= 45
