"""Stored names of canonical parameters."""

from __future__ import annotations

import pytest

from hasten.weights import Dialect, Packed, Param, params
from hasten.weights.dialect import key
from tests.weights.towers import APART, biased, routed, tower


def param(name: str, *blocks: object) -> Param:
    return next(p for p in params(tower(*blocks)) if p.name == name)  # pyright: ignore[reportArgumentType]


def test_names_are_relative_to_backbone_block_or_model() -> None:
    assert APART.names(param("tokens"), "model.") == ["model.embed"]
    assert APART.names(param("blocks.1.out.weight"), "model.") == ["model.blocks.1.a.o"]
    assert APART.names(param("head.weight"), "model.") == ["head"]


def test_parts_have_names_of_their_own_and_absent_ones_have_none() -> None:
    block = biased("qv")
    assert APART.names(param("blocks.0.qkv.weight", block), "") == ["blocks.0.a.q", "blocks.0.a.k", "blocks.0.a.v"]
    assert APART.names(param("blocks.0.qkv.bias", block), "") == ["blocks.0.a.q", "blocks.0.a.v"]


def test_experts_follow_one_another_each_with_its_parts() -> None:
    d = Dialect("experts", "b.{i}.", {"expert_up": ("e.{e}.w1", "e.{e}.w3"), "expert_down": "e.{e}.w2"})
    block = routed(2)
    assert d.names(param("blocks.0.up.weight", block), "") == ["b.0.e.0.w1", "b.0.e.0.w3", "b.0.e.1.w1", "b.0.e.1.w3"]
    assert d.names(param("blocks.0.down.bias", block), "") == ["b.0.e.0.w2", "b.0.e.1.w2"]


def test_a_slot_may_be_given_for_one_kind_alone() -> None:
    d = Dialect("odd", "b.{i}.", {"qkv": Packed("all"), "qkv.bias": ("q_bias", "k_bias", "v_bias")})
    block = biased("qkv")
    assert d.names(param("blocks.0.qkv.weight", block), "") == ["b.0.all"]
    assert d.names(param("blocks.0.qkv.bias", block), "") == ["b.0.q_bias", "b.0.k_bias", "b.0.v_bias"]
    assert not d.knows(param("blocks.0.out.weight"))


@pytest.mark.parametrize(
    ("kind", "there", "found"),
    [
        ("weight", {"a.weight", "a"}, "a.weight"),
        ("weight", {"a", "a.bias"}, "a"),
        ("weight", {"a.bias"}, None),
        ("bias", {"a.weight", "a.bias"}, "a.bias"),
        ("bias", {"a", "a_bias"}, "a_bias"),
        ("bias", {"a", "a.weight"}, None),
    ],
)
def test_a_name_stands_for_a_module_or_a_bare_tensor(kind: str, there: set[str], found: str | None) -> None:
    assert key("a", kind, there.__contains__) == found
