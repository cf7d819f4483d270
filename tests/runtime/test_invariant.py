"""Batch-invariant generation: a request's tokens and logarithms are the same bits in whatever company it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tests.ops.conftest  # noqa: F401 - what the interpreter needs with newer NumPys
from hasten import ops
from hasten.errors import RequestError
from hasten.model import Transformer
from hasten.ops.backends import load
from hasten.runtime import Generator, Sampling
from hasten.runtime.scheduler import Scheduler
from tests.runtime.models import transformer
from tests.runtime.test_steps import Again, Never
from tests.tiny import TINY, build

pytest.importorskip("triton", reason="Triton has no build for this platform")
pytest.importorskip("triton.tools.tensor_descriptor", reason="older Tritons leave the work to torch's kernels")
load()

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
Answer = tuple[Any, ...]


def answers(g: Generator, batch: Sequence[list[int]], how: Sequence[Sampling]) -> list[Answer]:
    """What is compared of each request: tokens, and the logarithms that it asked for."""
    return [(x.tokens, x.logprobs, x.likeliest) for x in g.generate(batch, how)]


def alone(g: Generator, batch: Sequence[list[int]], how: Sequence[Sampling]) -> list[Answer]:
    return [answers(g, [p], [s])[0] for p, s in zip(batch, how, strict=True)]


def pages(t: Transformer, count: int) -> int:
    """Bytes of so many pages of 16 tokens."""
    return count * 16 * t.tower.kv_width * t.weights["tokens"].element_size()


# ---- interpreted: what the runtime does, on a model of a few numbers


def tiny(name: str = "llama") -> Transformer:
    return transformer(build(TINY[name]).half())


@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the rule held in each pass through the blocks."""
    found: list[bool] = []
    blocks = Transformer.blocks

    def watched(self: Transformer, x: Tensor, *more: Any, **rows: Any) -> Tensor:
        found.append(ops.is_invariant())
        return blocks(self, x, *more, **rows)

    monkeypatch.setattr(Transformer, "blocks", watched)
    return found


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what tokens of nobody leave
@pytest.mark.parametrize("recorder", [Again(3), Never()], ids=["recorded", "launched"])
def test_every_pass_and_every_recording_is_under_the_rule(recorder: Any, ruled: list[bool]) -> None:
    t, batch = tiny(), [[5, 7, 11, 13, 17], [3], [40, 2, 9]]
    how = [Sampling(max_new_tokens=4), Sampling(max_new_tokens=3, temperature=1.0, seed=1), Sampling(max_new_tokens=2)]
    with Generator(t, memory_limit=pages(t, 50), recorder=recorder, invariant=True) as g:
        together = answers(g, batch, how)
        assert alone(g, batch, how) == together
    with Generator(t, memory_limit=pages(t, 50), budget=2, recorder=recorder, invariant=True) as g:
        assert answers(g, batch, how) == together
    assert ruled
    assert all(ruled)
    assert not ops.is_invariant()


def test_without_the_option_nothing_is_under_the_rule(ruled: list[bool]) -> None:
    t = transformer(build(TINY["llama"]))
    with Generator(t, memory_limit=pages(t, 50)) as g:
        g.generate([[5, 7]], Sampling(max_new_tokens=2))
    assert ruled
    assert not any(ruled)


def test_equal_logits_are_told_in_one_order_whatever_the_vocabulary() -> None:
    from hasten.runtime.sampler import _scores

    raw = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0]).repeat(201)[:1003].expand(3, -1)
    with ops.invariant():
        chosen, best, values = _scores(raw, torch.tensor([4, 0, 2]), 700)
    twos, ones = ([i for i, x in enumerate(raw[0].tolist()) if x == wanted] for wanted in (2.0, 1.0))
    assert best.tolist() == [(twos + ones)[:700]] * 3
    torch.testing.assert_close(values, raw.log_softmax(-1).gather(1, best), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(chosen, raw.log_softmax(-1)[range(3), [4, 0, 2]], atol=1e-6, rtol=1e-6)


def test_blocks_that_are_forced_to_a_backend_are_refused() -> None:
    t = tiny()
    forced = Transformer(t.tower, t.weights, {1: "reference"})
    with pytest.raises(RequestError, match="1 blocks are forced to a backend"):
        Generator(forced, memory_limit=pages(t, 50), invariant=True)


# ---- on a GPU: the claim itself

SIZES = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 1003}  # torch's rows of logits begin anywhere
BIG = 64  # requests


def llama_shaped() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            **SIZES,
        )
    )


def gpt2_shaped() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=384, n_layer=3, n_head=6, n_positions=1024, **SIZES)
    )


SHAPED = {"llama": llama_shaped, "gpt2": gpt2_shaped}


def on_gpu(name: str) -> Transformer:
    torch.manual_seed(0)
    return transformer(SHAPED[name]().cuda().bfloat16().eval())


def requests() -> list[list[int]]:
    """Prompts of 1 to 300 tokens."""
    return [torch.randint(3, 1003, (1 + 83 * i % 300,)).tolist() for i in range(BIG)]


def ways(logprobs: bool) -> list[Sampling]:
    """Greedy, drawn, and drawn with filters; logprobs: the host chooses, else the device does, several steps long."""
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 40, "top_p": 0.9}, {}]
    more: dict[str, Any] = {"logprobs": 3} if logprobs else {}
    return [
        Sampling(max_new_tokens=8 + 7 * i % 23, seed=i, ignore_eos=True, **kinds[i % 4], **more) for i in range(BIG)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("logprobs", [True, False], ids=["logprobs", "steps"])
@pytest.mark.parametrize("name", SHAPED)
def test_a_request_is_answered_alike_in_every_company(name: str, logprobs: bool) -> None:
    t, batch, how = on_gpu(name), requests(), ways(logprobs)
    with Generator(t, memory_limit=pages(t, 4096), invariant=True) as g:
        want = alone(g, batch, how)
        for size in (3, 17, BIG):
            for first in range(0, BIG - size + 1, size):
                some = slice(first, first + size)
                assert answers(g, batch[some], how[some]) == want[some], f"requests {some}"
        assert answers(g, batch, how) == want, "again, from records"
        mixed = ways(not logprobs)  # every other request asks for what the others did not
        both = [mixed[i] if i % 2 else s for i, s in enumerate(how)]
        got = answers(g, batch, both)
        assert [x[0] for x in got] == [x[0] for x in want]
    with Generator(t, memory_limit=pages(t, 4096), recorder=Never(), invariant=True) as g:
        assert answers(g, batch, how) == want, "launch by launch"


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [5, 64, 200])
@pytest.mark.parametrize("name", SHAPED)
def test_pieces_of_prompts_change_nothing(name: str, budget: int) -> None:
    t, batch, how = on_gpu(name), requests()[:20], ways(True)[:20]
    with Generator(t, memory_limit=pages(t, 4096), invariant=True) as g:
        want = alone(g, batch, how)
    with Generator(t, memory_limit=pages(t, 4096), budget=budget, invariant=True) as g:
        assert answers(g, batch, how) == want


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPED)
def test_running_again_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t, batch, how, gave = on_gpu(name), requests()[:20], ways(True)[:20], []
    with Generator(t, memory_limit=pages(t, 4096), invariant=True) as g:
        want = alone(g, batch, how)
    reserve = Scheduler._reserve

    def watched(self: Scheduler, *arguments: Any, **more: Any) -> bool:
        running = len(self.running)
        found = reserve(self, *arguments, **more)
        gave.append(running - len(self.running))
        return found

    monkeypatch.setattr(Scheduler, "_reserve", watched)
    with Generator(t, memory_limit=pages(t, 24), budget=100, invariant=True) as g:
        assert answers(g, batch, how) == want
    assert any(gave), "no sequence gave way: the pages are too many for this test"


@pytest.mark.gpu
def test_the_rule_is_needed() -> None:
    """Without it other kernels serve other numbers of rows, and some logarithm differs."""
    t, batch, how = on_gpu("llama"), requests(), ways(True)
    with Generator(t, memory_limit=pages(t, 4096)) as g:
        assert answers(g, batch, how) != alone(g, batch, how)
