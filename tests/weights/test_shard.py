"""A tower divided among ranks: every share is the parameter of a smaller tower, and together they are the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hasten.errors import ConfigError
from hasten.inject.attach import attach
from hasten.ops import alibi_slopes
from hasten.spec import Alibi, Mlp, Moe, Norm, Tower
from hasten.weights import Param, Split, check, is_split, join, local, params, shard, share, sizes
from tests.tiny import TINY, build
from tests.weights.towers import ATTENTION, MLP, PLAIN, biased, canonical, routed, tower

SIZES = 2, 3, 4
EXPERTS = replace(PLAIN, mlp=Moe(6, 2, Mlp(8, "silu", gated=True, bias=True), False, shared=Mlp(4, "silu", True, True)))
EVEN = replace(PLAIN, attention=replace(ATTENTION, bias="qo"), mlp=replace(MLP, width=8, bias=True))


def towers(name: str) -> list[Tower]:
    return [b.tower for b in attach(build(TINY[name]))]


def shares(p: Param, t: torch.Tensor, size: int, experts: Split = "inside") -> list[torch.Tensor]:
    return [shard(p, t, rank, size, experts) for rank in range(size)]


def holds(t: Tower, size: int, experts: Split = "inside") -> None:
    """The shares join to the whole, and are what the smaller towers have for parameters."""
    whole = canonical(t)
    plans = [{q.name: q for q in params(local(t, rank, size, experts))} for rank in range(size)]
    for p in params(t):
        own = shares(p, whole[p.name], size, experts)
        assert torch.equal(join(p, own, experts), whole[p.name]), p.name
        assert {s.shape for s in own} == {share(p, size, experts).shape}
        if p.role != "vocab":
            assert {plan[p.name] for plan in plans} == {share(p, size, experts)}
    assert all(plan.keys() == whole.keys() for plan in plans)


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_divided_and_joined_again(name: str) -> None:
    for t in towers(name):
        assert local(t, 0, 1) == t
        for experts in ("inside", "whole"):
            for size in SIZES:
                if size in sizes(t, experts):
                    holds(t, size, experts)
                else:
                    with pytest.raises(ConfigError, match=rf"divided among {size} ranks \(it can among 1"):
                        local(t, 0, size, experts)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("experts", ["inside", "whole"])
@pytest.mark.parametrize("span", ["head", "heads", "width"])
def test_an_awkward_tower(size: int, experts: Split, span: str) -> None:
    a = replace(ATTENTION, bias="kv", qk_norm=Norm("layer", 1e-5, bias=True), qk_norm_span=span, sinks=True)
    block = replace(EXPERTS if size == 2 else EVEN, attention=a, cross=replace(EVEN.attention, kv_heads=4))
    holds(tower(block, block), size, experts)


def test_one_key_value_head_is_on_every_rank_and_two_of_them_on_half_of_the_ranks_each() -> None:
    qkv = next(p for p in params(tower(EVEN)) if p.slot == "qkv")
    t = torch.randn(qkv.shape)
    own = shares(qkv, t, 4)
    assert [len(s) for s in own] == [9, 9, 9, 9]
    for rank in range(4):
        head = 12 + 3 * (rank // 2)  # of the keys; the values' are 6 rows on
        assert torch.equal(
            own[rank], torch.cat((t[3 * rank : 3 * rank + 3], t[head : head + 3], t[head + 6 : head + 9]))
        )


def test_a_share_that_is_one_slice_is_a_view() -> None:
    t = tower(EVEN)
    for p in params(t):
        whole = torch.randn(p.shape)
        own = shard(p, whole, 0, 2)
        assert (own.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) == (p.slot not in ("qkv", "up"))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_a_vocabulary_of_any_size_has_as_many_rows_on_every_rank(size: int) -> None:
    t = replace(tower(EVEN), head=replace(tower().head, bias=True))
    for p in [p for p in params(t) if p.role == "vocab"]:
        whole = torch.randn(p.shape)
        own = shares(p, whole, size)
        assert len({s.shape for s in own}) == 1
        assert torch.cat(own)[11:].eq(0).all()
        assert torch.equal(join(p, own), whole)


def test_what_is_not_split_is_the_same_tensor_everywhere() -> None:
    t = tower(replace(EVEN, mlp=routed().mlp))
    whole = {p.slot + "." + p.kind for p in params(t) if not is_split(p)}
    assert whole == {
        *("attn_norm.weight", "mlp_norm.weight", "final_norm.weight", "out.bias"),
        *("router.weight", "router.bias", "expert_down.bias"),
    }
    for p in params(t):
        if not is_split(p):
            x = torch.randn(p.shape)
            assert shard(p, x, 1, 2) is x
            assert join(p, [x, x]) is x
    assert {p.slot for p in params(t) if not is_split(p, "whole") and p.block is not None} == {
        *("attn_norm", "mlp_norm", "out", "router")
    }


def test_a_size_that_does_not_fit_is_refused_with_all_reasons_and_what_would() -> None:
    t = tower(EVEN, PLAIN, EVEN, routed(), EVEN, EVEN)
    with pytest.raises(ConfigError) as e:
        check(t, 8)
    assert str(e.value) == (
        "the model cannot be divided among 8 ranks (it can among 1):\n"
        "  4 attention heads in blocks 0-5\n"
        "  7 columns of the mlp in block 1\n"
        "  5 columns of an expert in block 3"
    )
    with pytest.raises(ConfigError, match="3 experts in block 0$"):
        check(tower(routed(3)), 2, "whole")
    with pytest.raises(
        ConfigError, match=r"among 3 ranks \(it can among 1, 2, 4\):\n  4 att[^\n]*\n  2 key[^\n]*\n  8 col"
    ):
        check(tower(EVEN), 3)
    assert sizes(tower(EXPERTS)) == [1, 2, 4]
    assert sizes(tower(EXPERTS), "whole") == [1, 2]


def test_a_rank_attends_with_the_slopes_of_its_own_heads() -> None:
    a = replace(ATTENTION, heads=12, kv_heads=12, position=Alibi(steepest=7.0))
    t = tower(replace(PLAIN, attention=a, mlp=replace(MLP, width=8)))
    own = [local(t, rank, 4).blocks[0].attention for rank in range(4)]
    got = torch.cat([alibi_slopes(b.position, b.heads) for b in own if isinstance(b.position, Alibi)])
    assert torch.equal(got, alibi_slopes(Alibi(steepest=7.0), 12))


def test_biases_of_missing_letters_stay_missing() -> None:
    t = tower(biased("q"))
    p = next(
        p for p in params(replace(t, blocks=(replace(t.blocks[0], mlp=replace(MLP, width=8)),))) if p.kind == "bias"
    )
    assert share(p, 2).absent == p.absent
    assert share(p, 2).parts == (6, 3, 3)
