"""A sequence in pages, in any order and in pieces of any size, computes what it computes in one piece."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Phi3Config, Phi3ForCausalLM

from hasten.model import Dense, Transformer
from hasten.ops import rope_table
from hasten.runtime import Generator, Sampling
from hasten.runtime.paged import Turns
from hasten.runtime.pages import Pages
from hasten.runtime.request import Request
from hasten.runtime.runner import Runner
from hasten.runtime.scheduler import Row, Scheduler, Sequence
from hasten.spec import Alibi, LongRope, Rope
from tests.runtime.models import theirs, transformer
from tests.tiny import TINY, Tiny, build

EVERYTHING = Sampling(max_new_tokens=1, logprobs=67)
ALIBI = {f"bloom {s=} {b=}": Alibi(scaled=s, bf16=b, steepest=7.3) for s in (False, True) for b in (False, True)}
MIXED = ["llama", "llama-dynamic", "mistral", "gemma2-capped", "gpt_oss", "bloom", "gpt_neox", "opt", *ALIBI]
MODELS: dict[str, Transformer] = {}


def model(name: str) -> Transformer:
    """A tiny model, made once; its alibi another one where ALIBI says so."""
    if name not in MODELS:
        t = transformer(build(TINY[name.split(maxsplit=1)[0]]))
        if name in ALIBI:
            steep = [replace(b, attention=replace(b.attention, position=ALIBI[name])) for b in t.tower.blocks]
            t = Transformer(replace(t.tower, blocks=tuple(steep)), t.weights)
        MODELS[name] = t
    return MODELS[name]


@pytest.mark.parametrize("name", MIXED)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    size=st.integers(1, 7),
    most=st.integers(1, 25),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=12)
def test_pieces_in_scattered_pages_equal_the_whole(
    name: str, lengths: list[int], size: int, most: int, order: random.Random
) -> None:
    t = model(name)
    runner = Runner(t, page_size=size, memory_limit=2**22)
    low, high = TINY[name.split(maxsplit=1)[0]].ids
    prompts = [tuple(order.choices(range(low, high), k=n)) for n in lengths]
    lines = [Sequence(Request(i, prompt, EVERYTHING, 0)) for i, prompt in enumerate(prompts)]
    free = list(range(sum(-(-n // size) for n in lengths) + 3))
    order.shuffle(free)
    for line, n in zip(lines, lengths, strict=True):
        line.pages = array("i", [free.pop() for _ in range(-(-n // size))])
    answers = {}
    while rows := [piece(line, order.randint(1, most)) for line in lines if line.cached < len(line.tokens)]:
        order.shuffle(rows)
        chosen = runner.start(rows).scores() or []
        answers |= dict(zip((row.sequence for row in rows if row.samples), chosen, strict=True))
        for row in rows:
            row.sequence.cached = row.stop
    for line in lines:
        shares = whole(t, line.tokens)
        got = answers[line].likeliest
        assert got is not None
        torch.testing.assert_close(torch.tensor([got[i] for i in range(len(shares))]), shares, atol=3e-5, rtol=3e-5)


def piece(line: Sequence, n: int) -> Row:
    stop = min(line.cached + n, line.length)
    return Row(line, line.cached, stop, stop == line.length)


@torch.no_grad()
def whole(t: Transformer, tokens: list[int]) -> torch.Tensor:
    """Logarithms of the next token's shares, float32 (vocabulary,), in one piece without pages."""
    positions = torch.arange(len(tokens))[None]
    x = t.blocks(t.embed(torch.tensor([tokens]), positions), Dense(positions))
    return t.logits(t.finish(x))[0, -1].log_softmax(-1)


def test_kept_tables_of_angles_grow_with_the_positions_asked_for() -> None:
    r, turns = Rope(6, 10000.0, "halves"), Turns()
    for highest in (0, 63, 127, 128, 255, 256, 1000, 5):
        positions = torch.tensor([highest, 0, highest // 2])
        for got, want in zip(turns.at(r, positions, highest), rope_table(r, positions, 0), strict=True):
            assert torch.equal(got, want)


SCALING = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 5.0, 7.0]}
LONG = Tiny(
    lambda: Phi3ForCausalLM(
        Phi3Config(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=56,
            vocab_size=67,
            pad_token_id=0,
            max_position_embeddings=64,
            original_max_position_embeddings=16,
            rope_scaling=SCALING,
        )
    ),
    "decoder",
)


@pytest.mark.parametrize(("pages", "budget"), [(100, 512), (13, 5)], ids=["roomy", "squeezed"])
def test_a_sequence_that_outgrows_longropes_short_factors_starts_over(pages: int, budget: int) -> None:
    hf = build(LONG)
    t = transformer(hf)
    scaling = getattr(t.tower.blocks[0].attention.position, "scaling", None)
    assert isinstance(scaling, LongRope) and scaling.original == 16
    batch = [torch.randint(3, 64, (n,)).tolist() for n in (5, 12, 18, 15, 16, 17, 1, 30)]
    with Generator(t, page_size=4, memory_limit=pages * 16 * t.tower.kv_width, budget=budget) as g:
        got = g.generate(batch, Sampling(max_new_tokens=20))
    assert [list(x.tokens) for x in got] == [theirs(hf, p, 20) for p in batch]


def test_the_restart_runs_every_token_again_once() -> None:
    runner = Runner(transformer(build(LONG)), page_size=4, memory_limit=2**20)
    assert runner.restarts == {16}
    scheduler = Scheduler(Pages(runner.pools.limit), 4, 512, restarts=runner.restarts)
    scheduler.add(Sequence(Request(0, (5,) * 14, Sampling(max_new_tokens=6), 0)))
    ran = []
    for _ in range(6):
        (row,) = scheduler.next()
        ran.append((row.start, row.stop))
        scheduler.advance([row], 1)
        row.sequence.hear([5])
    assert ran == [(0, 14), (14, 15), (15, 16), (0, 17), (17, 18), (18, 19)]
