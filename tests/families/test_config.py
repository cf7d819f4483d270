"""A config that says what no description covers is refused, by the name of the field, before anything is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers as T

from hasten.errors import ConfigError, UnsupportedModel
from hasten.families import FAMILIES
from hasten.families.fields import layer_types, rope
from hasten.inject.attach import attach
from hasten.spec import Dynamic, Linear, Llama3, LongRope, Rope, Scaling, Tower, Yarn
from hasten.spec.config import MATTERS, Config
from tests.tiny import TINY
from tests.tiny.llamas import BASE

LLAMA = T.LlamaConfig(**BASE).to_dict()


def describe(kind: str, values: dict[str, Any]) -> Tower:
    """The only tower of a family, from a config read to its end."""
    c = Config(values, "a config")
    (tower,) = FAMILIES[kind].describe(c).values()
    c.finish()
    return tower


def foreign() -> list[str]:
    """The fields that matter somewhere, and that LLaMA's description does not read."""
    c = Config(LLAMA, "a config")
    FAMILIES["llama"].describe(c)
    return sorted(MATTERS - c.read)


@pytest.mark.parametrize("field", foreign())
def test_a_field_that_matters_and_is_not_llamas_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=f"a config sets what this family does not know: {field}=3"):
        describe("llama", LLAMA | {field: 3})


def test_all_unknown_fields_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"clip_qkv=4\.0, kv_lora_rank=16, sliding_window=8"):
        describe("llama", LLAMA | {"sliding_window": 8, "clip_qkv": 4.0, "kv_lora_rank": 16, "temperature": 3})


@pytest.mark.parametrize("value", [None, False, 0, [], 1.0])
def test_a_field_that_is_switched_off_may_stay(value: Any) -> None:
    assert describe("llama", LLAMA | {"clip_qkv": value}) == describe("llama", LLAMA)


def test_the_message_says_which_class_the_config_came_from() -> None:
    model = T.LlamaForCausalLM(T.LlamaConfig(**BASE))
    model.config.clip_qkv = 2.0
    with pytest.raises(ConfigError, match=r"LlamaConfig of LlamaForCausalLM.*clip_qkv=2\.0"):
        attach(model)


@pytest.mark.parametrize(
    "kinds", [["full_attention"], ["full_attention"] * 4, [], ["full_attention", "full_attention", "chunked_attention"]]
)
def test_layer_types_of_another_length_or_kind_are_refused(kinds: list[str]) -> None:
    with pytest.raises(ConfigError, match="layer_types must give full_attention or sliding_attention for each of 3"):
        layer_types(Config({"layer_types": kinds}, "a config"), 3, "full_attention")


def test_layers_are_alike_where_no_types_are_given() -> None:
    assert layer_types(Config({}, "a config"), 2, "sliding_attention") == ["sliding_attention"] * 2


def test_a_window_that_no_layer_has_is_not_refused() -> None:
    values = T.Gemma2Config(**BASE, layer_types=["full_attention"] * 3).to_dict()
    assert {b.attention.window for b in describe("gemma2", values).blocks} == {None}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_an_unknown_rope_type_is_refused_with_those_that_are_known(key: str) -> None:
    c = Config({key: {"rope_type": "spiral"}, "max_position_embeddings": 8}, "a config")
    with pytest.raises(ConfigError, match="'spiral' is not one of default, linear, dynamic, llama3, yarn, longrope"):
        rope(c, 8)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "longrope"])
def test_a_scaling_without_its_numbers_is_refused_by_the_missing_name(kind: str) -> None:
    c = Config({"rope_scaling": {"type": kind}, "max_position_embeddings": 8}, "a config")
    with pytest.raises(ConfigError, match=f"a config: rope type '{kind}' needs '(factor|short_factor)'"):
        rope(c, 8)


SCALINGS: list[tuple[dict[str, Any], Scaling]] = [
    ({"rope_type": "linear", "factor": 3}, Linear(3.0)),
    ({"rope_type": "dynamic", "factor": 2}, Dynamic(2.0, 64)),
    (
        {
            "rope_type": "llama3",
            "factor": 8,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 32,
        },
        Llama3(8.0, 1.0, 4.0, 32),
    ),
    (
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "attention_factor": 1.25},
        Yarn(4.0, 16, 32.0, 1.0, 1.25, True),
    ),
    (
        {
            "rope_type": "longrope",
            "short_factor": [1, 2],
            "long_factor": [3, 4],
            "original_max_position_embeddings": 16,
            "attention_factor": 1.5,
        },
        LongRope((1.0, 2.0), (3.0, 4.0), 16, 1.5),
    ),
]


@pytest.mark.parametrize(("fields", "scaling"), SCALINGS, ids=[s[0]["rope_type"] for s in SCALINGS])
def test_transformers_4_and_5_say_the_same_rope_in_different_fields(fields: dict[str, Any], scaling: Scaling) -> None:
    four = {"rope_theta": 500.0, "rope_scaling": fields, "partial_rotary_factor": 0.5}
    older = {**four, "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in fields.items()}}
    five = {"rope_parameters": {**fields, "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
    for values in (four, older, five):
        c = Config(values | {"max_position_embeddings": 64}, "a config")
        assert rope(c, 8) == Rope(4, 500.0, "halves", scaling)


def test_kinds_of_layers_may_turn_at_different_rates() -> None:
    five = Config(
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9000.0},
            }
        },
        "a config",
    )
    four = Config(
        {"rope_theta": 9000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "a config",
    )
    for c in (five, four):
        assert rope(c, 8, kind="sliding_attention") == Rope(8, 100.0, "halves")
        assert rope(c, 8, kind="full_attention") == Rope(8, 9000.0, "halves", Linear(2.0))


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_an_unknown_activation_is_refused_with_those_that_are_known(kind: str) -> None:
    makers: dict[str, Callable[[], T.PretrainedConfig]] = {
        "llama": lambda: T.LlamaConfig(hidden_act="mish"),
        "bert": lambda: T.BertConfig(hidden_act="mish"),
        "gpt2": lambda: T.GPT2Config(activation_function="mish"),
    }
    with pytest.raises(ConfigError, match=r"(hidden_act|activation_function)='mish' is not one of gelu, .*silu"):
        describe(kind, makers[kind]().to_dict())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gpt_oss", {"swiglu_limit": 5.0}, r"swiglu_limit=5\.0 is not supported, only 7\.0"),
    ("olmoe", {"clip_qkv": 3.0}, r"clip_qkv=3\.0 is not supported, only its absence"),
]


@pytest.mark.parametrize(("name", "values", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_a_family_does_not_describe_is_refused(name: str, values: dict[str, Any], message: str) -> None:
    config = TINY[name].make().config.to_dict()
    with pytest.raises(ConfigError, match=message):
        describe(name, config | values)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="a config has no vocab_size"):
        describe("llama", {k: v for k, v in LLAMA.items() if k != "vocab_size"})


def test_gemma_3_with_eyes_is_refused_with_what_would_work() -> None:
    text = {**BASE, "head_dim": 8}
    eyes = {k: BASE[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    config = T.Gemma3Config(text_config=text, vision_config={**eyes, "image_size": 28, "patch_size": 14})
    model = T.Gemma3ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModel, match="no family describes model type 'gemma3'.*Three things would work"):
        attach(model)
