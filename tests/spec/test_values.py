"""Descriptions are values: compared, hashed, never changed, and free of torch."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from typing import Any

import pytest
import transformers as T

import hasten
from hasten import spec
from hasten.families import FAMILIES
from hasten.spec import Attention, Rope, Tower
from hasten.spec.config import Config
from tests.tiny.llamas import BASE

CLASSES = [c for _, c in inspect.getmembers(spec, inspect.isclass)]


def tower(**fields: Any) -> Tower:
    values = T.LlamaConfig(**BASE).to_dict() | fields
    return FAMILIES["llama"].describe(Config(values, "a config"))[""]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_description_is_frozen_and_has_slots(cls: type) -> None:
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
    assert "__slots__" in vars(cls)


def test_equal_configs_give_equal_towers_and_hashes() -> None:
    one, two = tower(), tower()
    assert one is not two
    assert one == two
    assert hash(one) == hash(two)
    assert {one: "found"}[two] == "found"


@pytest.mark.parametrize("field", [{"rms_norm_eps": 1e-3}, {"num_key_value_heads": 3}, {"hidden_act": "gelu"}])
def test_any_other_field_gives_another_tower(field: dict[str, Any]) -> None:
    assert tower(**field) != tower()


def test_heads_that_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match="6 heads cannot share 4 key-value heads evenly"):
        Attention(6, 4, 8, 1.0, causal=True, bias="")


def test_widths_follow_from_heads() -> None:
    a = Attention(6, 2, 10, 1.0, causal=True, bias="", position=Rope(10, 1e4, "halves"))
    assert (a.q_width, a.kv_width) == (60, 20)
    t = tower(head_dim=10)
    assert t.causal
    assert t.kv_width == 3 * 2 * 2 * 10


def test_descriptions_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, types; hasten = types.ModuleType('hasten'); hasten.__path__ = sys.argv[1:]; "
        "sys.modules['hasten'] = hasten; import hasten.spec; "
        "sys.exit(str([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules] or ''))"
    )
    found = subprocess.run([sys.executable, "-c", code, *hasten.__path__], capture_output=True, text=True, check=False)
    assert found.stderr.strip() == ""
