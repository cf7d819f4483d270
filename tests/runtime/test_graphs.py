"""On a GPU, decode steps run as CUDA graphs and say what single launches say."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.model import Transformer
from hasten.runtime import Generator, Sampling
from hasten.runtime.decoder import obstacle
from hasten.runtime.runner import Runner
from tests.runtime.models import DECODERS, transformer
from tests.runtime.test_generator import generator, prompts
from tests.runtime.test_steps import KINDS, Never, near, said
from tests.tiny import TINY, build

pytestmark = pytest.mark.gpu


def on_gpu(name: str = "llama") -> Transformer:
    """float32, where two kernels for one op agree on every token."""
    model: Any = build(TINY[name])
    return transformer(model.cuda())


def pair(t: Transformer, **arguments: Any) -> tuple[Generator, Generator]:
    """One that launches every op by itself, and one that records."""
    return generator(t, recorder=Never(), **arguments), generator(t, **arguments)


def recorded(g: Generator) -> str:
    return g.decoding


@pytest.mark.parametrize("name", DECODERS)
def test_graphs_say_what_launches_say(name: str) -> None:
    t, batch = on_gpu(name), prompts(name)
    launched, graphs = pair(t)
    with launched, graphs:
        s = [Sampling(max_new_tokens=n) for n in (40, 3, 9, 1, 12)]
        want = said(launched, batch, s)
        for _ in range(2):  # prompts are recorded when their shape comes again
            assert said(graphs, batch, s) == want
        assert "not " not in recorded(graphs)
        assert ("so far" in recorded(graphs)) == (obstacle(t) is None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_choosing_is_recorded(kind: str) -> None:
    batch = prompts()
    launched, graphs = pair(on_gpu())
    with launched, graphs:
        want = said(launched, batch, KINDS[kind])
        for _ in range(2):
            near(said(graphs, batch, KINDS[kind]), want)
        assert "not " not in recorded(graphs)


@pytest.mark.parametrize("name", ["llama", "gemma2-capped", "gpt_oss"])
def test_passes_of_many_tokens_are_recorded(name: str) -> None:
    """Prompts of up to 90 tokens, of which each pass of 2,048 tokens begins many, beside sequences with one new one."""
    t, batch = on_gpu(name), prompts(name, lengths=tuple(1 + 37 * i % 90 for i in range(120)))
    s = [Sampling(max_new_tokens=1 + 23 * i % 31, temperature=i % 2 * 1.0, seed=i) for i in range(120)]
    launched, graphs = pair(t, pages=4000)
    with launched, graphs:
        want = said(launched, batch, s)
        for _ in range(3):
            assert said(graphs, batch, s) == want
        decoder = graphs._runner.decoder
        assert decoder is not None and "not " not in recorded(graphs)
        assert {shape.tokens for shape, _ in decoder._records} >= {0, 2048}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_passes_that_begin_before_the_last_one_is_heard(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve sequences in four places, some of which stop early: prompts, pieces of them and steps in turn."""
    t, batch = on_gpu(name), prompts(name, lengths=(5, 9, 3, 21, 2, 7, 1, 13, 4, 6, 30, 2))
    with generator(t) as g:
        free = [x.tokens for x in g.generate(batch, Sampling(max_new_tokens=9))]
    s = [
        Sampling(max_new_tokens=2 + 3 * i, temperature=i % 2 * 1.0, seed=i, stop_tokens=[tokens[-1]] if i % 3 else ())
        for i, tokens in enumerate(free)
    ]
    begun, follow = list[int](), Runner.follow

    def counted(*arguments: Any) -> Any:
        work = follow(*arguments)
        begun.append(work is not None)
        return work

    monkeypatch.setattr(Runner, "follow", counted)
    monkeypatch.setattr("hasten.runtime.runner.PLACES", 4)
    launched, graphs = pair(t, budget=24)
    with launched, graphs:
        want = said(launched, batch, s)
        for _ in range(6):
            begun.clear()
            assert said(graphs, batch, s) == want
        assert any(begun)
        assert "not " not in recorded(graphs)


def test_seeds_give_the_same_tokens_in_every_batch() -> None:
    batch = prompts()
    s = [Sampling(max_new_tokens=30, temperature=1.2, seed=40 + i) for i in range(len(batch))]
    with generator(on_gpu()) as g:
        together = [x.tokens for x in g.generate(batch, s)]
        assert together == [g.generate([p], x)[0].tokens for p, x in zip(batch, s, strict=True)]
        assert together == [x.tokens for x in g.generate(batch, s)]


def test_batches_of_every_size_and_two_engines_at_once() -> None:
    first, second = on_gpu(), on_gpu("gpt2")
    batch, s = prompts(lengths=(5, 3, 8, 2, 7, 4, 9, 6, 1)), Sampling(max_new_tokens=12)
    with generator(first) as a, generator(second) as b:
        alone = [[g.generate([p], s)[0].tokens for p in batch] for g in (a, b)]
        for size in (9, 1, 4, 2, 8, 3):
            streams = [g.stream(batch[:size], s) for g in (a, b)]
            events: list[list[Any]] = [[], []]
            for x, y in zip(*streams, strict=True):
                events[0].append(x)
                events[1].append(y)
            for side, tokens in zip(events, alone, strict=True):
                for i in range(size):
                    assert tuple(e.token for e in side if e.index == i) == tokens[i]


def test_pages_that_run_out_make_sequences_wait_and_one_too_long_is_rejected() -> None:
    t, batch = on_gpu(), prompts(lengths=(9, 13, 7, 11, 60))
    with generator(t) as roomy, generator(t, pages=14) as tight:
        want, got = (g.generate(batch, Sampling(max_new_tokens=20)) for g in (roomy, tight))
        assert [x.tokens for x in got[:4]] == [x.tokens for x in want[:4]]
        assert got[4].finish_reason == "rejected"
        assert tight.memory <= roomy.memory


def test_what_no_capture_allows_is_launched_and_the_reason_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    t, batch = on_gpu(), prompts()
    with generator(t) as g:
        want = said(g, batch, Sampling(max_new_tokens=12))
    predict = Transformer.predict
    monkeypatch.setattr(Transformer, "predict", lambda self, x: predict(self, x * float(x.abs().max() >= 0)))
    with generator(t) as g:
        for _ in range(2):
            assert said(g, batch, Sampling(max_new_tokens=12)) == want
        assert "not 8 places" in recorded(g)
        monkeypatch.undo()
        assert said(g, batch[:1], Sampling(max_new_tokens=12)) == want[:1]
        assert "1 records so far" in recorded(g), "another shape is"
