"""All blocks in one call of the compiled kernels: what they give, and when the loop over blocks serves instead."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.model import Transformer, native_stack
from hasten.model.layer import Layer
from hasten.model.stack import Stack, stack
from hasten.ops import use
from hasten.ops.cpu.library import Library
from hasten.ops.cpu.native import ACTS
from hasten.runtime import Generator, Sampling
from hasten.spec import Alibi, Attention, Block, Mlp, Norm, Rope
from tests.ops.arguments import convert, random
from tests.ops.stack_cases import LAYER_NORM, PLAIN, context, layers, stack_case
from tests.ops.test_cpu import TOLERANCES, assert_close, outcome
from tests.ops.test_native import EACH_DTYPE, EACH_LEVEL, FOUND, NEEDED, at, fresh
from tests.runtime.models import theirs, transformer
from tests.tiny import TINY, build

ORDERS = ("pre", "post", "parallel", "parallel-shared")


def served(x: Tensor, s: Stack, ctx: Any) -> bool:
    return stack.choose(x, s, ctx) is stack.implementations[0].run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the library brought."""
    made, run = [], native_stack.run

    def counted(native: Library, x: Tensor, s: Stack, ctx: Any) -> Tensor:
        made.append(len(x))
        return run(native, x, s, ctx)

    monkeypatch.setattr(native_stack, "run", counted)
    return made


# ---- answers


def drawn_block(draw: Callable[..., Any]) -> Block:
    kv, group, pairs = (draw(st.integers(1, n)) for n in (2, 3, 9))
    dim = 2 * pairs + draw(st.integers(0, 3))
    rope = st.builds(Rope, st.just(2 * pairs), st.just(1e3), st.sampled_from(["halves", "neighbours"]))
    a = Attention(
        kv * group,
        kv,
        dim,
        dim**-0.5,
        True,
        draw(st.sampled_from(["", "qkvo", "o"])),
        draw(st.none() | rope | st.just(Alibi())),
        window=draw(st.none() | st.integers(1, 20)),
        softcap=draw(st.none() | st.floats(1.0, 20.0)),
        sinks=draw(st.booleans()),
    )
    act = draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]))
    mlp = Mlp(draw(st.integers(1, 90)), act, draw(st.booleans()), draw(st.booleans()))
    norm = draw(st.sampled_from([Norm("layer", 1e-5, True), Norm("rms", 1e-5), Norm("rms", 1e-5, offset=1.0)]))
    return Block(a, mlp, norm, "pre", residual=draw(st.sampled_from([1.0, 0.5])))


@NEEDED
@EACH_DTYPE
@EACH_LEVEL
@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
@settings(max_examples=20)
def test_blocks_of_any_size_are_the_reference(level: int, dtype: torch.dtype, order: Any, data: st.DataObject) -> None:
    block, width = replace(drawn_block(data.draw), order=order), data.draw(st.integers(1, 70))
    new = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=2).filter(any))
    lengths = [n + data.draw(st.integers(0, 70)) for n in new]
    ctx = context((block, block), lengths, new, data.draw(st.integers(1, 20)), dtype)
    arguments = random(sum(new), width, dtype=dtype), layers(width, (block, block), dtype), ctx
    assert served(*arguments)
    with use("reference"):
        want = outcome(stack.reference, convert(arguments, torch.float64))
        near = outcome(stack.reference, convert(arguments, dtype))
    got = outcome(lambda *a: native_stack.run(at(level), *a), arguments)
    # tiny widths make norms of nearly nothing: what the reference loses in this dtype is the yardstick
    lost = max(float((n.double() - w).abs().max()) for n, w in zip(near, want, strict=True) if n.numel())
    assert_close(got, want, 2 * TOLERANCES[dtype] + 2 * lost)


@NEEDED
@pytest.mark.parametrize("act", ACTS)
def test_every_activation(act: str) -> None:
    arguments = stack_case(replace(PLAIN, mlp=Mlp(50, act, False, True)), torch.float32)
    assert served(*arguments)
    with use("reference"):
        want = outcome(stack.reference, convert(arguments, torch.float64))
    assert_close(outcome(stack, arguments), want, 5e-6)


@NEEDED
def test_the_given_hidden_states_stay_as_they_are_and_nobody_else_writes_into_pages() -> None:
    x, s, ctx = stack_case(PLAIN, torch.float32)
    before, pools = x.clone(), [(k.clone(), v.clone()) for k, v in ctx.pools]
    assert stack(x, s, ctx).data_ptr() != x.data_ptr() and x.equal(before)
    elsewhere = torch.ones(ctx.tables.numel() * 4, dtype=torch.bool)
    elsewhere[ctx.where] = False
    for pair, was in zip(ctx.pools, pools, strict=True):
        for pool, old in zip(pair, was, strict=True):
            assert pool.flatten(0, 1)[elsewhere].equal(old.flatten(0, 1)[elsewhere])
            assert not pool.flatten(0, 1)[ctx.where].equal(old.flatten(0, 1)[ctx.where])


@NEEDED
def test_a_token_without_a_slot_is_kept_nowhere() -> None:
    x, s, ctx = stack_case(PLAIN, torch.float32)
    ctx = replace(ctx, where=torch.full_like(ctx.where, -1))
    pools = convert(ctx.pools, torch.float32)
    stack(x, s, ctx)
    assert all(a.equal(b) for new, old in zip(ctx.pools, pools, strict=True) for a, b in zip(new, old, strict=True))


@NEEDED
def test_the_number_of_threads_changes_no_bit() -> None:
    x, s, ctx = stack_case(PLAIN, torch.float32, width=512, heads=8, head_dim=64)
    alone = stack(x, s, ctx)
    try:
        torch.set_num_threads(3)
        assert stack(x, s, ctx).equal(alone)
    finally:
        torch.set_num_threads(1)


# ---- who is served


OTHERS: dict[str, Any] = {
    "sandwich": lambda: replace(PLAIN, order="sandwich"),
    "reordered": lambda: replace(PLAIN, order="reordered"),
    "q and k norms": lambda: replace(PLAIN, attention=replace(PLAIN.attention, qk_norm=Norm("rms", 1e-5))),
    "clip": lambda: replace(PLAIN, attention=replace(PLAIN.attention, clip=1.0)),
    "layer scale": lambda: replace(PLAIN, layer_scale=True),
    "wide heads": lambda: replace(PLAIN, attention=replace(PLAIN.attention, head_dim=258)),
    "both directions": lambda: replace(PLAIN, attention=replace(PLAIN.attention, causal=False)),
    "cross attention": lambda: replace(PLAIN, cross=replace(PLAIN.attention, position=None, causal=False)),
}


@NEEDED
@pytest.mark.parametrize("name", OTHERS)
def test_one_layer_that_is_not_served_leaves_all_to_the_loop(name: str) -> None:
    blocks = PLAIN, OTHERS[name]()
    x, ctx = random(1, 32, dtype=torch.float32), context(blocks, (5,), (1,), 4, torch.float32)
    assert not served(x, layers(32, blocks, torch.float32), ctx)
    assert served(x, layers(32, (PLAIN, PLAIN), torch.float32), ctx)


@NEEDED
def test_contexts_numbers_and_gradients_that_are_not_served() -> None:
    x, s, ctx = stack_case(PLAIN, torch.float32)
    assert served(x, s, ctx)
    assert not served(x.double(), s, ctx)
    assert not served(x.bfloat16(), s, ctx)
    assert not served(x[None], s, ctx)
    assert not served(x, Stack(()), ctx)
    assert not served(x, s, convert(ctx, torch.float64))
    assert not served(x.clone().requires_grad_(), s, ctx)
    s.layers[1].attention.out.weight.requires_grad_()
    assert not served(x, s, ctx)
    with torch.no_grad():
        assert served(x, s, ctx)


# ---- weights


def weights_of(one: Layer) -> Tensor:
    return one.attention.qkv.weight


@NEEDED
def test_weights_that_change_or_move_are_read_where_they_are() -> None:
    x, s, ctx = stack_case(LAYER_NORM, torch.float32)
    first, was = stack(x, s, ctx), native_stack._plans[s][torch.float32]
    weights_of(s.layers[0]).mul_(2)
    changed = stack(x, s, ctx)
    assert not changed.equal(first) and native_stack._plans[s][torch.float32] is was
    torch.testing.assert_close(changed, stack.reference(x, s, ctx))
    for t in (weights_of(s.layers[1]), s.layers[0].mlp.around.before.weight):  # pyright: ignore
        t.data = 3 * t.data
    torch.testing.assert_close(stack(x, s, ctx), stack.reference(x, s, ctx))
    assert native_stack._plans[s][torch.float32] is not was


@NEEDED
def test_a_plan_goes_with_its_stack_and_a_copy_has_its_own() -> None:
    x, s, ctx = stack_case(PLAIN, torch.float32)
    stack(x, s, ctx)
    other = copy.deepcopy(s)
    weights_of(other.layers[0]).zero_()
    assert not stack(x, other, ctx).equal(stack(x, s, ctx))
    torch.testing.assert_close(stack(x, other, ctx), stack.reference(x, other, ctx))
    count = len(native_stack._plans)
    del s, other
    gc.collect()
    assert len(native_stack._plans) == count - 2


# ---- transformers


NAMES = ["gpt2", "llama", "gptj", "gpt_neox", "falcon", "mpt", "bloom", "opt", "gemma", "phi", "mistral", "cohere"]
TOLD = Sampling(max_new_tokens=12)


def prompts(name: str) -> list[list[int]]:
    low, high = TINY[name].ids
    return [torch.randint(low, high, (n,)).tolist() for n in (5, 31, 3)]


@NEEDED
@pytest.mark.parametrize("name", NAMES)
def test_generation_takes_it_and_says_what_transformers_says(name: str, calls: list[int]) -> None:
    hf, given = build(TINY[name]), prompts(name)
    with Generator(transformer(hf), page_size=4) as g:
        got = g.generate(given, TOLD)
    assert calls[-11:] == [3] * 11
    assert [list(x.tokens) for x in got] == [theirs(hf, p, 12) for p in given]


@NEEDED
def test_two_models_in_turns_do_not_disturb_each_other(calls: list[int]) -> None:
    both = [build(TINY[name]) for name in ("gpt2", "llama")]
    makers = [Generator(transformer(hf), page_size=4) for hf in both]
    given = prompts("gpt2")[:1]
    streams = [g.stream(given, TOLD) for g in makers]
    said = list(zip(*streams, strict=True))
    for hf, events in zip(both, zip(*said, strict=True), strict=True):
        assert [e.token for e in events if e.token is not None] == theirs(hf, given[0], 12)
    assert len(calls) >= 22


@NEEDED
def test_a_backend_for_a_block_a_forced_one_and_a_watch_have_the_loop(calls: list[int]) -> None:
    t = transformer(build(TINY["gpt2"]))
    s, width = t._stack, t.tower.width
    x, ctx = random(1, width, dtype=torch.float32), context(t.tower.blocks, (5,), (1,), 4, torch.float32)
    with torch.no_grad():
        want = t.blocks(x, ctx)
        assert calls == [1]
        seen: list[int] = []
        t.blocks(x, ctx, lambda i, h: seen.append(i))
        assert seen == list(range(len(s.layers)))
        for backend in ("reference", "native"):  # the latter has every op of such a block
            with use(backend):
                torch.testing.assert_close(t.blocks(x, ctx), want)
        careful = Transformer(t.tower, t.weights, {1: "reference"})
        torch.testing.assert_close(careful.blocks(x, ctx), want)
    assert calls == [1]


@NEEDED
def test_a_forked_child_and_many_threads_get_their_own_answers() -> None:
    code = """
import os, signal
from concurrent.futures import ThreadPoolExecutor
import torch
from hasten.model.stack import stack
from tests.ops.stack_cases import PLAIN, stack_case
work = [stack_case(PLAIN, torch.float32, width=256) for _ in range(4)]
torch.set_num_threads(1)
want = [stack(*w) for w in work]
torch.set_num_threads(3)
def check(i):
    return all(stack(*work[i]).equal(want[i]) for _ in range(100))
with ThreadPoolExecutor(4) as many:
    assert all(many.map(check, range(4)))
if (child := os.fork()) == 0:
    signal.alarm(60)
    os._exit(not check(0))
print(os.waitpid(child, 0)[1])
"""
    assert fresh(code) == "0\n"


def test_without_the_library_the_loop_serves() -> None:
    code = """
import torch
from hasten.model.stack import stack
from tests.ops.stack_cases import PLAIN, stack_case
arguments = stack_case(PLAIN, torch.float32)
print(stack.choose(*arguments) is stack.reference, stack(*arguments).shape[0])
"""
    assert fresh(code, HASTEN_CPU="off") == "True 3\n"
    assert isinstance(FOUND, Library | str)
