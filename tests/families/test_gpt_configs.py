"""What configs of GPT-like families may not say, and what some of them say between the lines."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.errors import ConfigError
from hasten.families import FAMILIES
from hasten.spec import Alibi, Rope, Tower
from hasten.spec.config import Config
from tests.tiny import TINY


def describe(name: str, **changes: Any) -> Tower:
    """The tower of a tiny model's config with some fields changed; a dict changes a nested config's."""
    model = TINY[name].make()
    values = model.config.to_dict()
    for field, value in changes.items():
        values[field] = {**values[field], **value} if isinstance(value, dict) else value
    c = Config(values, "a config")
    (tower,) = FAMILIES[model.config.model_type].describe(c).values()
    c.finish()
    return tower


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt_bigcode", {"add_cross_attention": True}),
        ("xglm", {"add_cross_attention": True}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("falcon-40b", {"parallel_attn": False}),
        ("mpt", {"expansion_ratio": 3}),
        ("mpt", {"logit_scale": 0.5}),
        ("mpt", {"no_bias": False}),
        *(("mpt", {"attn_config": {k: v}}) for k, v in (("qk_ln", True), ("alibi", False), ("prefix_lm", True))),
        ("mpt", {"attn_config": {"alibi_bias_max": 16}}),
        ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}),
        ("gptj", {"rotary_dim": None}),
        ("phi", {"hidden_act": "mystery"}),
        ("stablelm", {"sliding_window": 8}),
        ("gpt_neo", {"attention_layers": ["global", "banded", "local"]}),
        ("openai-gpt", {"afn": "mystery"}),
    ],
    ids=str,
)
def test_what_has_no_description_is_refused_by_name(name: str, changes: dict[str, Any]) -> None:
    ((field, value),) = changes.items()
    named = next(iter(value)) if isinstance(value, dict) else field
    with pytest.raises(ConfigError, match=named):
        describe(name, **changes)


def test_falcons_three_shapes() -> None:
    seven, forty, rw = (describe(n).blocks[0] for n in ("falcon", "falcon-40b", "falcon-rw"))
    assert (seven.order, seven.attention.kv_heads) == ("parallel-shared", 1)
    assert (forty.order, forty.attention.kv_heads) == ("parallel", 2)
    assert (rw.order, rw.attention.kv_heads) == ("pre", rw.attention.heads)
    assert isinstance(forty.attention.position, Rope)
    assert rw.attention.position == Alibi(scaled=True, bf16=True)


def test_rope_turns_the_share_of_a_head_that_each_family_says() -> None:
    shares = {"phi": 0.5, "stablelm": 0.25, "persimmon": 0.5, "starcoder2": 1.0, "gpt_neox_japanese": 1.0}
    for name, share in shares.items():
        a = describe(name).blocks[0].attention
        assert isinstance(a.position, Rope)
        assert a.position.dim == int(a.head_dim * share), name


def test_a_narrow_embedding_is_projected_and_back() -> None:
    t = describe("opt-350m")
    assert t.embed.projection is not None and t.embed.projection.back
    assert t.final_norm is None and {b.order for b in t.blocks} == {"post"}
    assert describe("opt").embed.projection is None
