"""Native generation gives what transformers' generate() gives, whatever the batch, the pages and the order."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from hasten.errors import HastenError, RequestError
from hasten.inject.attach import attach
from hasten.model import Transformer
from hasten.runtime import Generation, Generator, Sampling
from hasten.weights import params
from tests.runtime.models import DECODERS, llama, theirs, theirs_scored, transformer
from tests.runtime.toys import Portions, Words
from tests.tiny import TINY, build

LENGTHS = (13, 3, 7, 1, 9)
WARM = {
    "temperature": 1.3,
    "top_k": 30,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
}
WORDS = Words([f"w{i}" for i in range(67)])


def prompts(name: str = "llama", lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [torch.randint(*TINY[name].ids, (n,)).tolist() for n in lengths]


def generator(t: Transformer | None = None, pages: int = 200, **arguments: Any) -> Generator:
    """Over pages of four tokens, so many of them."""
    t = llama() if t is None else t
    memory = pages * 4 * t.tower.kv_width * t.weights["tokens"].element_size()
    return Generator(t, page_size=4, memory_limit=memory, **arguments)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("pages", "budget"), [(200, 512), (9, 6)], ids=["roomy", "squeezed"])
def test_greedy_tokens_of_a_ragged_batch_equal_transformers(name: str, pages: int, budget: int) -> None:
    model, batch = build(TINY[name]), prompts(name)
    with generator(transformer(model), pages, budget=budget) as g:
        got = g.generate(batch, Sampling(max_new_tokens=14, logprobs=0))
    for x, p in zip(got, batch, strict=True):
        tokens, logprobs = theirs_scored(model, p, 14)
        assert list(x.tokens) == tokens
        torch.testing.assert_close(torch.tensor(x.logprobs), torch.tensor(logprobs), atol=3e-5, rtol=3e-5)
        assert x.finish_reason == "length"


@pytest.mark.parametrize("penalty", [0.6, 1.7])
def test_the_repetition_penalty_equals_transformers(penalty: float) -> None:
    model, batch = build(TINY["llama"]), prompts()
    with generator(transformer(model)) as g:
        got = g.generate(batch, Sampling(max_new_tokens=14, repetition_penalty=penalty))
    assert [list(x.tokens) for x in got] == [theirs(model, p, 14, repetition_penalty=penalty) for p in batch]


def test_end_tokens_and_least_lengths_equal_transformers() -> None:
    model, batch = build(TINY["llama"]), prompts()
    ends = sorted({theirs(model, p, 9)[-1] for p in batch})
    for least in (0, 5):
        with generator(transformer(model), eos=ends) as g:
            got = g.generate(batch, Sampling(max_new_tokens=12, min_new_tokens=least))
        want = [theirs(model, p, 12, eos_token_id=ends, min_new_tokens=least or None) for p in batch]
        assert [list(x.tokens) for x in got] == want
        assert [x.finish_reason for x in got] == ["stop" if x.tokens[-1] in ends else "length" for x in got]
        assert "stop" in {x.finish_reason for x in got}


def test_ignored_end_tokens_do_not_stop_and_a_requests_own_stop_tokens_do() -> None:
    batch = prompts(lengths=(5,))
    with generator() as g:
        free = g.generate(batch, Sampling(max_new_tokens=12))[0].tokens
    with generator(eos=free[2]) as g:
        assert g.generate(batch, Sampling(max_new_tokens=12))[0].tokens == free[: free.index(free[2]) + 1]
        assert g.generate(batch, Sampling(max_new_tokens=12, ignore_eos=True))[0].tokens == free
        own = Sampling(max_new_tokens=12, ignore_eos=True, stop_tokens=[free[6]])
        assert g.generate(batch, own)[0].tokens == free[: free.index(free[6]) + 1]


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_after_restarts() -> None:
    t, batch = llama(), prompts()
    samplings = [Sampling(max_new_tokens=14, seed=40 + i, **WARM) for i in range(len(batch))]
    with generator(t) as g:
        together = g.generate(batch, samplings)
        alone = [g.generate([p], s)[0] for p, s in zip(batch, samplings, strict=True)]
        other = g.generate(batch, [Sampling(max_new_tokens=14, seed=90 + i, **WARM) for i in range(len(batch))])
    with generator(t, pages=9, budget=6) as g:
        squeezed = g.generate(batch, samplings)
    assert [x.tokens for x in together] == [x.tokens for x in alone] == [x.tokens for x in squeezed]
    assert all(a.tokens != b.tokens for a, b in zip(together, other, strict=True))


def test_without_a_seed_torch_decides() -> None:
    hot, batch = Sampling(max_new_tokens=14, temperature=2.0), prompts(lengths=(3,))
    with generator() as g:
        answers = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            answers.append(g.generate(batch, hot)[0].tokens)
        state = torch.get_rng_state()
        g.generate(batch, Sampling(max_new_tokens=2))
        assert torch.equal(state, torch.get_rng_state()), "greedy generation draws nothing"
    assert answers[0] == answers[1] != answers[2]


def test_several_completions_of_a_prompt_differ_and_stand_side_by_side() -> None:
    batch = prompts(lengths=(4, 2))
    samplings = [Sampling(max_new_tokens=8, temperature=1.5, seed=1, n=3), Sampling(max_new_tokens=8, n=2)]
    with generator() as g:
        got = g.generate(batch, samplings)
        first = g.generate(batch[:1], Sampling(max_new_tokens=8, temperature=1.5, seed=1))
    assert [(x.index, x.sample) for x in got] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert len({x.tokens for x in got[:3]}) == 3
    assert got[0].tokens == first[0].tokens
    assert got[3].tokens == got[4].tokens


def test_logprobs_are_those_of_the_models_own_forward() -> None:
    model, batch = build(TINY["llama"]), prompts()
    with generator(transformer(model)) as g:
        none = g.generate(batch, Sampling(max_new_tokens=6))
        some = g.generate(batch, [Sampling(max_new_tokens=6, temperature=0.7, seed=3, logprobs=k) for k in range(5)])
    assert {(x.logprobs, x.likeliest) for x in none} == {(None, None)}
    assert some[0].likeliest is None
    for k, x in enumerate(some):
        with torch.no_grad():
            logits = model(torch.tensor([[*x.prompt, *x.tokens]])).logits[0, len(x.prompt) - 1 : -1]
        shares = logits.log_softmax(-1)
        assert x.logprobs is not None
        want = shares.gather(1, torch.tensor(x.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(x.logprobs), want, atol=2e-5, rtol=2e-5)
        for step, best in enumerate(x.likeliest or ()):
            values, ids = shares[step].topk(k)
            assert list(best) == ids.tolist()
            torch.testing.assert_close(torch.tensor(list(best.values())), values, atol=2e-5, rtol=2e-5)


def test_the_stream_says_what_generate_gives() -> None:
    batch = prompts()
    s = Sampling(max_new_tokens=7, temperature=1.0, seed=5, logprobs=2, n=2)
    with generator(tokenizer=WORDS, pages=12, budget=7) as g:
        whole, events = g.generate(batch, s), list(g.stream(batch, s))
    for x in whole:
        mine = [e for e in events if (e.index, e.sample) == (x.index, x.sample)]
        assert tuple(e.token for e in mine) == x.tokens
        assert tuple(e.logprob for e in mine) == x.logprobs
        assert tuple(e.likeliest for e in mine) == x.likeliest
        assert "".join(e.text or "" for e in mine) == x.text
        assert [e.finish_reason for e in mine] == [None] * 6 + ["length"]


def test_text_is_what_the_tokenizer_decodes_and_ends_before_a_stop() -> None:
    with generator(tokenizer=WORDS, eos=2) as g:
        (free,) = g.generate(["w5 w9 w11"], Sampling(max_new_tokens=12, ignore_eos=True))
        assert free.text == " " + WORDS.decode(list(free.tokens), skip_special_tokens=True)
        words = (free.text or "").split()
        cut = Sampling(max_new_tokens=12, ignore_eos=True, stop=[f"{words[3]} ", "zz"])
        (stopped,) = g.generate(["w5 w9 w11"], cut)
        assert stopped.finish_reason == "stop"
        assert stopped.text == (free.text or "").split(f"{words[3]} ")[0]
        assert stopped.tokens == free.tokens[: words.index(words[3]) + 2]
    with generator(tokenizer=WORDS, eos=free.tokens[4]) as g:
        (ended,) = g.generate(["w5 w9 w11"], Sampling(max_new_tokens=12))
        at = free.tokens.index(free.tokens[4])
        assert ended.tokens == free.tokens[: at + 1]
        assert (ended.text or "").split() == words[:at]


def test_a_stop_string_across_tokens_holds_text_back_until_it_is_certain() -> None:
    portions = Portions([bytes([97 + i % 26]) for i in range(67)])
    hot = Sampling(max_new_tokens=12, temperature=3.0, seed=1)
    with generator(tokenizer=portions) as g:
        (free,) = g.generate([[5, 9]], hot)
        stop = (free.text or "")[4:7]
        assert stop not in (free.text or "")[:6]
        events = list(g.stream([[5, 9]], replace(hot, stop=[stop])))
    assert "".join(e.text or "" for e in events) == (free.text or "")[:4]
    assert len(events) == 7 and events[-1].finish_reason == "stop"


def test_a_prompt_that_can_never_fit_is_rejected_alone() -> None:
    batch = [[5] * 50, [7, 8, 9], [6] * 20]
    t = llama()
    with generator(t, pages=6) as g:
        got = g.generate(batch, Sampling(max_new_tokens=5))
        events = list(g.stream(batch[:1], Sampling(max_new_tokens=5)))
    with generator(t) as g:
        want = g.generate(batch, Sampling(max_new_tokens=5))
    assert [x.finish_reason for x in got] == ["rejected", "length", "length"]
    assert got[0].tokens == ()
    need = "prompt 0: 50 tokens and 5 new ones need 14 pages of 4 tokens; the memory limit allows 6"
    assert got[0].error == need
    assert [x.tokens for x in got[1:]] == [x.tokens for x in want[1:]]
    assert [(e.token, e.finish_reason) for e in events] == [(None, "rejected")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", DECODERS)
def test_half_precision_gives_sound_logits(name: str, dtype: torch.dtype) -> None:
    model = build(TINY[name], dtype)
    with generator(transformer(model)) as g:
        got = g.generate(prompts(name), Sampling(max_new_tokens=5, logprobs=0))
    for x in got:
        with torch.no_grad():
            logits = model.float()(torch.tensor([[*x.prompt, *x.tokens]])).logits[0, len(x.prompt) - 1 : -1]
        want = logits.log_softmax(-1).gather(1, torch.tensor(x.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(x.logprobs), want, atol=0.25, rtol=0.1)


def test_batches_of_any_size_follow_each_other() -> None:
    t, batch = llama(), prompts()
    with generator(t) as g:
        alone = [g.generate([p], Sampling(max_new_tokens=6))[0].tokens for p in batch]
        for size in (1, 5, 2, 4, 1):
            assert [x.tokens for x in g.generate(batch[:size], Sampling(max_new_tokens=6))] == alone[:size]


def test_a_second_generator_does_not_disturb_the_first() -> None:
    batch = prompts(lengths=(5, 3))
    s = Sampling(max_new_tokens=9)
    first, second = (transformer(build(TINY[name])) for name in ("llama", "gpt2"))
    with generator(first) as a, generator(second) as b:
        want = [[x.tokens for x in g.generate(batch, s)] for g in (a, b)]
        one, two = a.stream(batch, s), b.stream(batch, s)
        mixed: list[list[Any]] = [[], []]
        for x, y in zip(one, two, strict=True):
            mixed[0].append(x), mixed[1].append(y)
        b.close()
        assert [x.tokens for x in a.generate(batch, s)] == want[0]
    for events, tokens in zip(mixed, want, strict=True):
        for i in range(2):
            assert tuple(e.token for e in events if e.index == i) == tokens[i]


def test_two_streams_of_one_generator_share_its_pages_and_nothing_else() -> None:
    t, s = llama(), Sampling(max_new_tokens=9)
    one, two = prompts(lengths=(5, 2)), prompts(lengths=(6, 3))
    with generator(t) as g:
        want = [[x.tokens for x in g.generate(p, s)] for p in (one, two)]
        pair = list(zip(g.stream(one, s), g.stream(two, s), strict=True))
    for side in (0, 1):
        for i in range(2):
            assert tuple(e[side].token for e in pair if e[side].index == i) == want[side][i]


def test_a_stream_that_finds_no_pages_says_who_has_them() -> None:
    with generator(pages=6) as g:
        held = g.stream([[5] * 17], Sampling(max_new_tokens=7))
        next(held)
        with pytest.raises(RequestError, match="1 sequences wait for pages, of which other streams .* hold 5 of 6"):
            g.generate([[6] * 17], Sampling(max_new_tokens=7))
        held.close()  # dropping a stream frees its pages
        assert g.generate([[6] * 17], Sampling(max_new_tokens=7))[0].finish_reason == "length"


def test_memory_grows_with_what_is_asked_and_close_gives_it_back() -> None:
    g = generator(pages=200)
    page = g.generate([[5, 6]], Sampling(max_new_tokens=2)) and g.memory
    assert page == llama().tower.kv_width * 4 * 4
    g.generate([[5] * 30] * 3, Sampling(max_new_tokens=9))
    assert 30 * page <= g.memory <= 60 * page
    pools = [weakref.ref(pool.untyped_storage()) for pair in g._runner.pools.layers for pool in pair]
    g.close()
    gc.collect()
    assert g.memory == 0
    assert all(pool() is None for pool in pools)
    with pytest.raises(RequestError, match="closed"):
        g.generate([[5]])


def test_closing_ends_a_stream_with_an_error() -> None:
    g = generator()
    events = g.stream([[5, 6]], Sampling(max_new_tokens=9))
    next(events)
    g.close()
    with pytest.raises(RequestError, match="closed"):
        next(events)


def test_logits_that_are_not_numbers_are_an_error_and_no_token() -> None:
    t = llama()
    t.weights["final_norm.weight"].fill_(torch.inf)
    told = "prompt 0: the model's logits for token 2 are not numbers"
    with generator(t) as g, pytest.raises(HastenError, match=told):
        g.generate([[5, 6]], Sampling(max_new_tokens=2))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bert", "no language model head, its attention is not causal"),
        ("vit", "takes no token ids"),
        ("t5", "buckets"),
        ("bart", "encoder's output"),
    ],
)
def test_towers_that_pages_cannot_serve_are_refused(name: str, why: str) -> None:
    tower = attach(build(TINY[name]))[-1].tower
    with pytest.raises(RequestError, match=f"{why}.*transformers' own generate"):
        Generator(Transformer(tower, {p.name: torch.empty(p.shape, device="meta") for p in params(tower)}))


def test_a_generation_is_a_value() -> None:
    with generator() as g:
        a, b = (g.generate([[5, 6]], Sampling(max_new_tokens=3))[0] for _ in range(2))
    assert a == b and isinstance(a, Generation)
