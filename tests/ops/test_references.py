"""The references against torch's modules, transformers' functions and loops by hand; in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from hasten.ops import (
    ACTS,
    GATED,
    NormLayer,
    act,
    alibi_slopes,
    attend,
    attend_pages,
    bucket,
    gated,
    norm,
    use,
    write_pages,
)
from hasten.spec import Alibi, Attention, Buckets, Norm
from tests.ops.cases import CASES

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def references() -> object:
    with use("reference"):
        yield


def equal(got: Tensor, want: Tensor, bound: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE)


# ---- norms and activations


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_that_of_torch(bias: bool) -> None:
    module = torch.nn.LayerNorm(37, eps=1e-3, bias=bias, dtype=DOUBLE)
    module.weight.data = random(37)
    if bias:
        module.bias.data = random(37)
    x = random(2, 3, 37)
    equal(norm(x, NormLayer(Norm("layer", 1e-3, bias), module.weight, module.bias)), module(x))


@pytest.mark.parametrize("wide", [True, False])
def test_rms_norm_is_that_of_torch(wide: bool) -> None:
    x, weight = random(2, 3, 37), random(37)
    equal(norm(x, NormLayer(Norm("rms", 1e-3, wide=wide), weight)), F.rms_norm(x, (37,), weight, 1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "spec"),
    [(LlamaRMSNorm, Norm("rms", 1e-5)), (GemmaRMSNorm, Norm("rms", 1e-5, offset=1.0, wide=True))],
    ids=["llama", "gemma"],
)
def test_rms_norm_rounds_where_transformers_rounds(module: type, spec: Norm, dtype: torch.dtype) -> None:
    theirs = module(40, eps=1e-5).to(dtype)
    theirs.weight.data = torch.randn(40).to(dtype)
    x = (torch.randn(3, 50, 40) * 5).to(dtype)
    ours = norm(x, NormLayer(spec, theirs.weight.data))
    if dtype == torch.float32:
        equal(ours, theirs(x).detach(), 1e-6)
    else:
        assert ours.equal(theirs(x))


def test_norm_with_a_weight_per_head_is_a_norm_of_each_head() -> None:
    x, weight = random(2, 3, 5, 16), random(5, 16)
    got = norm(x, NormLayer(Norm("rms", 1e-5), weight))
    for h in range(5):
        equal(got[:, :, h], F.rms_norm(x[:, :, h], (16,), weight[h], 1e-5))


THEIR_ACTS = {
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "tanh": "tanh",
}


@pytest.mark.parametrize("kind", ACTS)
def test_activation_is_that_of_transformers(kind: str) -> None:
    x = random(3, 17) * 3
    equal(act(x, kind), ACT2FN[THEIR_ACTS[kind]](x))
    equal(gated(torch.cat((x, x + 1), -1), kind), ACT2FN[THEIR_ACTS[kind]](x) * (x + 1))


def test_clamped_swiglu_clamps_the_gate_from_above_and_the_other_half_on_both_sides() -> None:
    gate, other = torch.tensor([9.0, -9.0, 1.0], dtype=DOUBLE), torch.tensor([-9.0, 9.0, 0.5], dtype=DOUBLE)
    want = [7 / (1 + math.exp(-1.702 * 7)) * -6, -9 / (1 + math.exp(1.702 * 9)) * 8, 1 / (1 + math.exp(-1.702)) * 1.5]
    equal(GATED["clamped_swiglu"](gate, other), torch.tensor(want, dtype=DOUBLE))


# ---- attention


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Attention,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """One score at a time, in Python's own numbers."""
    out, (batch, queries, heads, _) = torch.zeros_like(q), q.shape
    whole = (batch, heads, queries, k.shape[1])
    seen = torch.ones(whole, dtype=torch.bool) if mask is None else mask.expand(whole)
    extra = torch.zeros(whole) if bias is None else bias.expand(whole)
    for b, h, s in ((b, h, s) for b in range(batch) for h in range(heads) for s in range(queries)):
        own, total = h // (heads // k.shape[2]), 0.0 if sinks is None else math.exp(float(sinks[h]))
        for t in range(k.shape[1]):
            if not seen[b, h, s, t]:
                continue
            score = float(q[b, s, h] @ k[b, t, own]) * a.scale
            score = score if a.softcap is None else a.softcap * math.tanh(score / a.softcap)
            weight = math.exp(score + float(extra[b, h, s, t]))
            total, out[b, s, h] = total + weight, out[b, s, h] + weight * v[b, t, own]
        out[b, s, h] /= total or 1.0
    return out


@pytest.mark.parametrize("case", CASES["attend"])
def test_attention_is_the_sum_written_by_hand(case: str) -> None:
    arguments = CASES["attend"][case](DOUBLE)
    equal(attend(*arguments), by_hand(*arguments))


@pytest.mark.parametrize("group", [1, 3])
def test_attention_is_that_of_torch(group: int) -> None:
    a = Attention(6, 6 // group, 10, 0.2, True, "")
    q, k, v = random(2, 5, 6, 10), random(2, 7, 6 // group, 10), random(2, 7, 6 // group, 10)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    q4, k4, v4 = (t.transpose(1, 2) for t in (q, k, v))
    want = F.scaled_dot_product_attention(q4, k4, v4, mask, scale=0.2, enable_gqa=True)
    equal(attend(q, k, v, a, mask, None, None), want.transpose(1, 2))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_query_that_sees_nothing_gets_zeros(backend: str | None, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 6, 4, 8).to(dtype) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril() & (torch.arange(6) > 2)
    for bias in (None, torch.randn(4, 6, 6).to(dtype)):
        with use(backend):
            got = attend(q, k, v, Attention(4, 4, 8, 0.3, True, ""), mask, bias, None)
        assert not got.isnan().any()
        assert got[:, :3].eq(0).all()
        assert got[:, 3:].ne(0).all()


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 71, 112])
def test_alibi_slopes_are_those_of_bloom_and_mpt(heads: int) -> None:
    ours = alibi_slopes(Alibi(), heads)
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    equal(ours, bloom, 1e-6)
    for steepest in (4, 8):
        mpt = -build_mpt_alibi_tensor(heads, 2, steepest)[:, 0, 0]  # of the key one before
        equal(alibi_slopes(Alibi(steepest=steepest), heads), mpt, 1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("count", "far"), [(32, 128), (16, 20), (8, 300)])
def test_bucket_is_that_of_t5(count: int, far: int, bidirectional: bool) -> None:
    distance = torch.arange(-400, 401)
    want = T5Attention._relative_position_bucket(distance, bidirectional, count, far)
    assert bucket(distance, Buckets(count, far, bidirectional)).equal(want)


# ---- pages


def flat(pool: Tensor, table: Tensor, length: int) -> Tensor:
    """The tokens of one sequence in order, one at a time."""
    size = pool.shape[1]
    return torch.stack([pool[int(table[t // size]), t % size] for t in range(length)])[None]


@pytest.mark.parametrize("case", CASES["attend_pages"])
def test_paged_attention_is_attention_over_gathered_keys(case: str) -> None:
    q, keys, values, tables, starts, lengths, a, slopes, sinks = arguments = CASES["attend_pages"][case](DOUBLE)
    got = attend_pages(*arguments)
    starts = torch.arange(len(lengths) + 1) if starts is None else starts
    for r, length in enumerate(lengths.tolist()):
        rows = slice(int(starts[r]), int(starts[r + 1]))
        if not length:
            assert not got[rows].any()
            continue
        here, key = torch.arange(length)[length - len(q[rows]) :, None], torch.arange(length)
        mask = (key <= here) & (key > here - (a.window or length + 1))
        bias = None if slopes is None else slopes.view(-1, 1, 1) * (key - here)
        k, v = flat(keys, tables[r], length), flat(values, tables[r], length)
        equal(got[rows], by_hand(q[None, rows], k, v, a, mask, bias, sinks)[0])


@pytest.mark.parametrize("backend", ["reference", None])
@given(data=st.data())
def test_order_of_pages_and_size_of_chunks_change_nothing(backend: str | None, data: st.DataObject) -> None:
    length, size = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    window = data.draw(st.none() | st.integers(1, 14))
    count = -(-length // size)
    a = Attention(4, 2, 8, 0.3, True, "", window=window)
    q, k, v = random(length, 4, 8), random(length, 2, 8), random(length, 2, 8)

    def run(table: Tensor, cuts: list[int]) -> Tensor:
        pools, out = [random(count + 1, size, 2, 8) for _ in range(2)], []
        for first, last in zip([0, *cuts], [*cuts, length], strict=True):
            token = torch.arange(first, last)
            write_pages(k[first:last], v[first:last], *pools, table[token // size].long() * size + token % size)
            starts, lengths = torch.tensor([0, last - first]), torch.tensor([last])
            out.append(attend_pages(q[first:last], *pools, table[None], starts, lengths, a, None, None))
        return torch.cat(out)

    order = torch.tensor(data.draw(st.permutations(range(count + 1))))[:count].int()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=3)) - {length})
    with use(backend):
        equal(run(order, cuts), run(torch.arange(count).int(), []))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("slots", [[4, 5, 6], [6, 0, 3], [-1, 7, 2], [5], []])
def test_written_pages_hold_the_tokens_and_nothing_else_changed(backend: str | None, slots: list[int]) -> None:
    keys, values, k, v = random(4, 2, 3, 5).half(), random(4, 2, 3, 5).half(), random(3, 3, 5), random(3, 3, 5)
    k, v, before = k[: len(slots)], v[: len(slots)], (keys.clone(), values.clone())
    with use(backend):
        write_pages(k, v, keys, values, torch.tensor(slots, dtype=torch.int64))
    for pool, old, new in ((keys, before[0], k), (values, before[1], v)):
        for slot in range(8):
            want = new[slots.index(slot)].half() if slot in slots else old[slot // 2, slot % 2]
            assert pool[slot // 2, slot % 2].equal(want)
