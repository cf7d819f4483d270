"""What ranks say to each other inside a model: norms over divided widths, divided tables, and how often they speak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.model import Dense, Transformer
from hasten.model.native_stack import serves
from hasten.ops import EmbedLayer, NormLayer, embed, embed_over, norm, norms_over
from hasten.parallel import Place
from hasten.spec import Head, Moe, Norm, Tokens, Tower
from hasten.weights import local, params, shard
from tests.parallel import threads
from tests.parallel.towers import weights
from tests.weights.towers import ATTENTION, MLP, PLAIN, tower

EVEN = replace(PLAIN, mlp=replace(MLP, width=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "kind", [Norm("rms", 1e-5), Norm("rms", 1e-2, wide=True, offset=1.0), Norm("layer", 1e-3, True)]
)
def test_norms_over_a_width_that_ranks_divide(kind: Norm, dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 5, 12).add(3).to(dtype), torch.randn(2, 5, 6).to(dtype)
    n, m = (NormLayer(kind, *torch.randn(2, w).to(dtype)) for w in (12, 6))
    n, m = (layer if kind.bias else replace(layer, bias=None) for layer in (n, m))

    def own(t: Any, p: Place) -> Any:
        return t if t is None else p.own(t, -1)

    def normed(g: threads.Threads) -> list[Tensor]:
        p = Place(g)
        parts = [(own(t, p), NormLayer(kind, own(k.weight, p), own(k.bias, p))) for t, k in ((x, n), (y, m))]
        out = norms_over(parts, g)
        assert g.exchanges == (2 if kind.kind == "layer" else 1)
        return out

    made = threads.run(3, normed)
    bound = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for k, want in enumerate((norm(x, n), norm(y, m))):
        torch.testing.assert_close(torch.cat([r[k] for r in made], -1), want, atol=bound, rtol=bound)


def table(**more: Any) -> tuple[Tokens, EmbedLayer]:
    e = Tokens(11, 6, positions=9, types=2, **more)
    return e, EmbedLayer(e, torch.randn(11, 6), torch.randn(9, 6), torch.randn(2, 6))


@pytest.mark.parametrize("size", [2, 3, 8])  # eight ranks of two rows: the last two have none that is a token's
def test_a_divided_table_gives_every_rank_the_same_vectors(size: int) -> None:
    e, layer = table(scale=3.0)
    p = next(p for p in params(replace(tower(EVEN), embed=e)) if p.name == "tokens")
    ids, positions = torch.arange(11).view(1, 11), torch.arange(11).view(1, 11) % 9

    def looked_up(g: threads.Threads) -> Tensor:
        own = replace(layer, tokens=shard(p, layer.tokens, g.rank, g.size))
        return embed_over(ids, positions, ids % 2, own, g)

    want = embed(ids, positions, ids % 2, layer)
    assert all(torch.equal(got, want) for got in threads.run(size, looked_up))


@pytest.mark.parametrize("wrong", [-1, 11])
def test_an_id_that_no_rank_has_is_refused_by_all_before_they_speak(wrong: int) -> None:
    _, layer = table()

    def looked_up(g: threads.Threads) -> int:
        with pytest.raises(IndexError, match="outside of 0 to 10"):
            embed_over(torch.tensor([[1, wrong]]), None, None, replace(layer, tokens=layer.tokens[:6]), g)
        return g.exchanges

    assert threads.run(2, looked_up) == [0, 0]


MIXTURE = Moe(4, 2, replace(MLP, width=8), renormalize=True, shared=replace(MLP, width=4))
WIDE_NORMS = replace(ATTENTION, qk_norm=Norm("rms", 1e-6), qk_norm_span="width")
SPOKEN = {
    "pre": (EVEN, 2),
    "sandwich": (replace(EVEN, order="sandwich"), 2),
    "parallel": (replace(EVEN, order="parallel"), 1),
    "parallel, norm shared, experts": (replace(EVEN, order="parallel-shared", mlp=MIXTURE), 1),
    "experts": (replace(EVEN, mlp=MIXTURE), 2),
    "cross attention": (replace(EVEN, cross=ATTENTION), 3),
    "norms over the width": (replace(EVEN, attention=WIDE_NORMS), 3),
    "parallel, layer scales": (replace(EVEN, order="parallel", layer_scale=True, residual=0.3), 1),
}


@pytest.mark.parametrize("size", [2, 4])  # four ranks: each key-value head on two of them
@pytest.mark.parametrize("name", SPOKEN)
def test_a_block_speaks_as_often_as_it_must_and_computes_the_same(name: str, size: int) -> None:
    block, times = SPOKEN[name]
    t = tower(block, block)
    whole, x, memory = weights(t), torch.randn(2, 5, 10), torch.randn(2, 3, 10)
    ctx = Dense(torch.arange(5).expand(2, 5), memory=memory)
    want = Transformer(t, whole).blocks(x, ctx)

    def through(g: threads.Threads) -> Tensor:
        own = {p.name: shard(p, whole[p.name], g.rank, g.size) for p in params(t)}
        y = Transformer(local(t, g.rank, g.size), own, place=Place(g)).blocks(x, ctx)
        assert g.exchanges == 2 * times
        return y

    for got in threads.run(size, through):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_the_compiled_stack_takes_no_layer_that_has_to_speak() -> None:
    def served(g: threads.Threads) -> list[bool]:
        t = tower(EVEN)
        own = {p.name: shard(p, w, g.rank, g.size) for p, w in ((p, torch.randn(p.shape)) for p in params(t))}
        alone, split = Transformer(local(t, 0, 2), own), Transformer(local(t, 0, 2), own, place=Place(g))
        return [serves(m.layers[0], torch.randn(1, 10)) for m in (alone, split)]

    assert all(not split for _, split in threads.run(2, served))


def heads(t: Tower, **more: Any) -> Tower:
    return replace(t, head=Head(tied=False, bias=True, scale=0.5, softcap=2.0), **more)


@pytest.mark.parametrize("size", [2, 4])
def test_logits_of_a_divided_head_are_whole_without_gaps_and_without_padding(size: int) -> None:
    t = heads(tower(EVEN))
    whole, x = weights(t), torch.randn(2, 3, 10)
    want = Transformer(t, whole).predict(x)

    def predicted(g: threads.Threads) -> Tensor:
        own = {p.name: shard(p, whole[p.name], g.rank, g.size) for p in params(t)}
        return Transformer(local(t, g.rank, g.size), own, place=Place(g)).predict(x)

    for got in threads.run(size, predicted):
        assert got.is_contiguous()
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
