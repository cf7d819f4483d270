"""What a work costs at least, against the tensors of the models themselves and published arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hasten
from hasten.bench.ceilings import Ceilings, multiplied, read
from hasten.bench.cost import Cost, passage, step
from hasten.bench.shapes import make
from hasten.families import FAMILIES
from hasten.spec import Tower


def tower(name: str) -> Tower:
    return hasten.init_inference(make(name, torch.float32, "cpu"), device="cpu").backbones[0].tower


def described(name: str) -> Tower:
    """Without a weight: these models are too large to be made here."""
    model = make(name, torch.float16, "meta")
    family = FAMILIES[model.config.model_type]
    return next(iter(family.describe(family.read(model)).values()))


# Gigabytes of weights and of keys and values of 1,024 tokens that a step reads in 16 bits, at batch 1.
PUBLISHED = {
    "llama-3.2-1b": (2.471, 0.0336),
    "llama-3.1-8b": (15.009, 0.1342),
    "qwen3-8b": (15.136, 0.1510),
    "gpt2": (0.247, 0.0377),
    "gpt2-xl": (3.110, 0.3146),
    "gpt-j-6b": (11.687, 0.4698),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_reads_the_published_bytes(name: str) -> None:
    weights, cached = PUBLISHED[name]
    t = described(name)
    assert step(t, 2, 1, 1024).bytes == pytest.approx((weights + cached) * 1e9, rel=0.002)
    assert step(t, 2, 8, 1024).bytes == pytest.approx((weights + 8 * cached) * 1e9, rel=0.002)


def test_windows_bound_what_is_read_of_the_cache() -> None:
    t = described("gpt-neo-2.7b")  # every second layer sees 256 tokens
    short, long = step(t, 2, 1, 256).bytes, step(t, 2, 1, 2048).bytes
    assert long - short == pytest.approx(16 * 2 * 2560 * 2 * (2048 - 256))


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-bert", "tiny-vit"])
def test_a_passage_does_the_operations_that_torch_counts(name: str) -> None:
    model = make(name, torch.float32, "cpu")
    model.config._attn_implementation = "eager"
    batch, tokens = 3, 16 + (name == "tiny-vit")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        match name:
            case "tiny-vit":
                model(torch.randn(batch, 3, 32, 32))
            case "tiny-bert":
                model.encoder(torch.randn(batch, tokens, 32))
            case _:
                model(torch.randint(96, (batch, tokens)), logits_to_keep=1)
    counted = counter.get_total_flops()
    got = passage(tower(name), 4, batch, tokens).flops
    t = tower(name)
    if t.causal:  # torch counts the masked half too
        a = t.blocks[0].attention
        counted -= len(t.blocks) * batch * 4 * a.q_width * (tokens * tokens - tokens * (tokens + 1) / 2)
    if name == "tiny-vit":  # its patch embedding and pooler lie outside the tower
        counted -= 2 * batch * (16 * 32 * 3 * 64 + 32 * 32)
    assert got == pytest.approx(counted, rel=1e-6)


def told(shared: tuple[float, str, float]) -> tuple[float, str, float]:
    rate, of, share = shared
    return round(rate, 6), of, round(share, 9)


def test_the_nearer_ceiling_is_the_one_that_counts() -> None:
    c = Ceilings(1e12, {torch.float16: 1e15})
    reads, multiplies = Cost(1e9, 1e9), Cost(1e6, 1e12)  # 1 ms each at best
    assert told(c.share([reads], torch.float16, 2e-3)) == (500.0, "GB/s", 0.5)
    assert told(c.share([multiplies], torch.float16, 4e-3)) == (250.0, "TFLOP/s", 0.25)


def test_phases_follow_each_other() -> None:
    """A prompt bound by products and steps bound by reading take the sum of their limits, not the larger one."""
    c = Ceilings(1e12, {torch.float16: 1e15})
    reads, multiplies = Cost(1e9, 1e9), Cost(1e6, 1e12)
    assert told(c.share([multiplies, reads, reads], torch.float16, 6e-3)) == (pytest.approx(333.5), "GB/s", 0.5)
    assert told(c.share([multiplies, multiplies, reads], torch.float16, 6e-3))[1:] == ("TFLOP/s", 0.5)


def test_ceilings_are_measured() -> None:
    assert 1e8 < read(0.05) < 1e13
    assert 1e8 < multiplied(torch.device("cpu"), torch.float32) < 1e14
