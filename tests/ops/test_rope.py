"""Rotary embedding and its scalings against those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

from hasten.ops import rope, rope_rates, rope_table
from hasten.spec import Dynamic, Linear, Llama3, LongRope, Rope, Scaling, Yarn

DIM, THETA, ORIGINAL = 16, 5000.0, 64
SHORT, LONG = tuple(1 + i / 10 for i in range(8)), tuple(2 + i / 3 for i in range(8))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": list(SHORT),
    "long_factor": list(LONG),
    "attention_factor": 1.19,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}

SCALINGS: dict[str, tuple[dict[str, Any], Scaling]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, Linear(4.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, Dynamic(2.0, ORIGINAL)),
    "llama3": (LLAMA3, Llama3(8.0, 1.0, 4.0, ORIGINAL)),
    # 1.1386 = 0.1 ln(4) + 1
    "yarn": (YARN, Yarn(4.0, ORIGINAL, 32.0, 1.0, 1.138629436111989, True)),
    "yarn, real ends": (YARN | {"truncate": False}, Yarn(4.0, ORIGINAL, 32.0, 1.0, 1.138629436111989, False)),
    "yarn, own ramp and magnitude": (
        YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 0.9},
        Yarn(4.0, ORIGINAL, 8.0, 0.5, 0.9, True),
    ),
    "yarn, ends that meet": (
        YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False, "attention_factor": 1.0},
        Yarn(4.0, ORIGINAL, 1.0, 1.0, 1.0, False),
    ),
    "longrope": (LONGROPE, LongRope(SHORT, LONG, ORIGINAL, 1.19)),
}


@pytest.mark.parametrize("length", [1, ORIGINAL, ORIGINAL + 1, 300])
@pytest.mark.parametrize("name", SCALINGS)
def test_rates_and_magnitude_are_those_of_transformers(name: str, length: int) -> None:
    theirs, ours = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=DIM,
        max_position_embeddings=ORIGINAL if name == "dynamic" else 4 * ORIGINAL,
        rope_theta=THETA,
        rope_scaling=dict(theirs),
    )
    if name == "longrope":
        config.original_max_position_embeddings = ORIGINAL  # where transformers 4 looks for it, as in Phi-3's config
    want, magnitude = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"), seq_len=length)
    rates, ours_magnitude = rope_rates(Rope(DIM, THETA, "halves", ours), length)
    assert rates.dtype == torch.float32
    torch.testing.assert_close(rates, want, rtol=2e-6, atol=0)
    assert ours_magnitude == pytest.approx(magnitude, abs=1e-12)


def test_llama_rotates_like_halves() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=DIM, rope_theta=THETA)
    positions = torch.tensor([[0, 1, 2, 700], [5, 4, 3, 2]])
    q, k = torch.randn(2, 4, 4, DIM), torch.randn(2, 4, 2, DIM)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    want = llama(q, k, cos, sin, unsqueeze_dim=2)
    r = Rope(DIM, THETA, "halves")
    for x, turned in zip((q, k), want, strict=True):
        torch.testing.assert_close(rope(x, *rope_table(r, positions, 701), r), turned, rtol=0, atol=1e-6)


def test_gptj_rotates_like_neighbours() -> None:
    positions = torch.tensor([[0, 1, 2, 60], [5, 4, 3, 2]])
    sin, cos = create_sinusoidal_positions(64, DIM)[positions].chunk(2, -1)
    x, r = torch.randn(2, 4, 3, DIM + 6), Rope(DIM, 10000.0, "neighbours")
    want = torch.cat((gptj(x[..., :DIM], sin, cos), x[..., DIM:]), -1)
    torch.testing.assert_close(rope(x, *rope_table(r, positions, 64), r), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pairing", ["halves", "neighbours"])
def test_scores_depend_on_distance_alone(pairing: Any) -> None:
    r = Rope(DIM, THETA, pairing)
    q, k = torch.randn(1, 1, DIM).double(), torch.randn(1, 1, DIM).double()

    def score(here: int, there: int) -> float:
        tables = (rope_table(r, torch.tensor([p]), 64) for p in (here, there))
        return float(
            torch.sum(
                torch.mul(*(rope(x, c.double(), s.double(), r) for x, (c, s) in zip((q, k), tables, strict=True)))
            )
        )

    assert score(9, 4) == pytest.approx(score(30, 25), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_magnitude_scales_cosine_and_sine() -> None:
    long = Rope(DIM, THETA, "halves", LongRope(SHORT, LONG, ORIGINAL, 1.19))
    cos, sin = rope_table(long, torch.arange(5), 5)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((5, DIM // 2), 1.19**2))
