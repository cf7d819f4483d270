"""Plans of models that no family describes: what is found, what is refused, and that nothing changes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.errors import ConfigError, UnsupportedModel
from hasten.inject.linears import find
from hasten.inject.linears.plan import Cut, Plan
from hasten.inject.linears.rehearsal import ON_RANKS, REHEARSED, apart
from tests.inject.strangers import DECLARED, NAMES, WIDTH, Block, declared, own, reader

SPARSE = ("glm4_moe", "deepseek_v3", "ernie4_5_moe")
OF_LINEARS = {"out_features", "in_features", "nf", "nx"}


def cuts(plan: Plan, within: str = "") -> dict[str, tuple[int, int]]:
    return {c.name.removeprefix(within): (c.axis, c.parts) for c in plan.cuts if c.name.startswith(within)}


def counts(plan: Plan) -> set[str]:
    return {str(n) for n in plan.counts if n.name not in OF_LINEARS}


def state(model: nn.Module) -> list[Any]:
    """All that a search could leave behind on a model."""
    own = [{k: v for k, v in vars(m).items() if type(v) in (int, bool) or k == "forward"} for m in model.modules()]
    hooks = [len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    asked = [p.requires_grad for p in model.parameters()]
    return [own, hooks, asked, [t.untyped_storage().data_ptr() for t in model.state_dict().values()]]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before, values = state(model), {n: t.clone() for n, t in model.state_dict().items()}
    yield
    assert state(model) == before
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())


BLOCK = {
    "attention.out.weight": (1, 1),
    **{f"attention.{n}.{what}": (0, 1) for n in ("query", "key", "value") for what in ("weight", "bias")},
    "up.weight": (0, 1),
    "up.bias": (0, 1),
    "down.weight": (1, 1),
}
HALVES = {"Attention.heads 4 -> 2", "Attention.kv_heads 2 -> 1", f"Attention.hidden {WIDTH} -> {WIDTH // 2}"}


@pytest.mark.parametrize("names", [NAMES, {}], ids=["named", "traced"])
def test_the_plan_of_a_users_own_decoder(names: Any) -> None:
    model = own().train()
    with untouched(model):
        plan = find(model, names, 2).plan
    for k in range(3):
        assert cuts(plan, f"blocks.{k}.") == BLOCK
    assert len(plan.cuts) == 3 * len(BLOCK)
    assert {(s.path, s.kind) for s in plan.seams} == {
        (f"blocks.{k}.{n}", "rows") for k in range(3) for n in ("attention.out", "down")
    }
    assert counts(plan) == HALVES


@pytest.mark.parametrize("names", [NAMES, {}], ids=["named", "traced"])
def test_query_key_and_value_in_one_linear_are_found_to_lie_in_three_runs(names: Any) -> None:
    plan = find(own(fused=True, kv_heads=4), names, 4).plan
    assert cuts(plan, "blocks.1.attention.") == {"out.weight": (1, 1), "qkv.weight": (0, 3), "qkv.bias": (0, 3)}
    assert cuts(plan, "blocks.1.up.") == {"weight": (0, 1), "bias": (0, 1)}


def test_a_trace_of_an_encoder_with_modules_of_experts() -> None:
    model = reader()
    with untouched(model):
        plan = find(model, {}, 2).plan
    assert counts(plan) == {"ReaderLayer.num_attention_heads 4 -> 2", "ReaderLayer.all_head_size 28 -> 14"}
    assert cuts(plan, "layers.1.experts.") == {
        f"{k}.{n}": cut for k in range(3) for n, cut in (("0.weight", (1, 1)), ("0.bias", (0, 1)), ("2.weight", (0, 1)))
    }
    assert cuts(plan, "pooler") and cuts(plan, "classes") == {".weight": (1, 1)}
    assert not cuts(plan, "layers.0.router")


@pytest.mark.parametrize("kind", DECLARED)
def test_a_plan_that_transformers_declares(kind: str) -> None:
    model = declared(kind)
    with untouched(model):
        plan = find(model, {}, 2).plan
    assert plan.source == "transformers' tp_plan"
    assert counts(plan) == set()
    experts = cuts(plan, "model.layers.1.mlp.experts.")
    if "model.layers.1.mlp.experts.gate_up_proj" in dict(model.named_parameters()):
        assert experts == {"gate_up_proj": (1, 2), "down_proj": (2, 1)}
    else:
        assert bool(experts) == (kind in SPARSE)
    assert any(n.endswith("self_attn.o_proj.weight") for n in cuts(plan)) == (kind != "deepseek_v3")
    assert not any(n.startswith(("lm_head", "model.embed")) for n in cuts(plan))  # 67 is odd; the table is whole


def test_a_declared_head_is_divided_where_its_rows_can_be() -> None:
    for rows, cut in ((68, {"weight": (0, 1)}), (67, {})):
        model = declared("olmo", vocab_size=rows)
        model._tp_plan = {**model._tp_plan, "lm_head": "colwise_gather_output"}
        assert cuts(find(model, {}, 2).plan, "lm_head.") == cut
        model.lm_head.weight = model.model.embed_tokens.weight
        assert cuts(find(model, {}, 2).plan, "lm_head.") == {}


REFUSED: dict[str, tuple[Any, Any, int, str]] = {
    "rows of what is whole": (own, {Block: ("attention.query", "down")}, 2, r"query: of its input, it has shape"),
    "no rows where they are needed": (own, {Block: ("down",)}, 2, r"among 1\): blocks\.0\.attention"),
    "odd heads": (lambda: own(heads=3, kv_heads=3), NAMES, 2, r"Own cannot .* 2 ranks .*\(it can among 1\)"),
    "few kv heads": (own, NAMES, 4, r"cannot be divided among 4 ranks by the names .*\(it can among 1, 2\)"),
    "declared, few kv heads": (lambda: declared("olmo"), {}, 4, r"tp_plan \(it can among 1, 2\): .*_proj: behind it"),
    "odd widths": (own, NAMES, 3, r"\(it can among 1, 2\): blocks\.0\.down is 52 wide.*blocks\.0\.up is 52 wide"),
    "nothing to divide": (lambda: nn.Sequential(nn.Linear(4, 4)), {}, 2, "no linear takes what others alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_that_is_not_exact_is_refused(case: str) -> None:
    make, names, size, says = REFUSED[case]
    model = make()
    with untouched(model), pytest.raises(UnsupportedModel, match=says):
        find(model, names, size)


class Mixing(nn.Module):
    """Between its linears it divides by what only the whole features tell."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return x + self.head(x + self.down(y / y.norm(dim=-1, keepdim=True)))


def test_features_that_are_mixed_are_noticed_by_their_values() -> None:
    model = Mixing()
    with (
        untouched(model),
        pytest.raises(UnsupportedModel, match=r"down: of its input, it differs by 0\.\d+ in the mean"),
    ):
        find(model, {Mixing: ("down",)}, 2)


def test_what_a_trace_cannot_divide_exactly_stays_whole_and_is_told() -> None:
    found = find(own(heads=3, kv_heads=3), {}, 2)
    assert set(cuts(found.plan, "blocks.2.")) == {"up.weight", "up.bias", "down.weight"}
    assert [n for n in found.notes if n.startswith("blocks.*.attention.out stays whole: ")] == [*found.notes]


@pytest.mark.parametrize(
    ("style", "says"),
    [("sequence_parallel", "'sequence_parallel' of model.layers.0.mlp is not known"), ("colwise", "MLP")],
)
def test_a_declared_style_that_cannot_be_followed_is_named(style: str, says: str) -> None:
    model = declared("olmo")
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp": style}
    with untouched(model), pytest.raises(UnsupportedModel, match=says):
        find(model, {}, 2)


class Twofold(nn.Module):
    """Its second part answers other inputs than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.images = own(), Mixing()

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) if ids.dtype == torch.long else self.images(ids)


def test_what_no_probe_reaches_is_not_divided() -> None:
    model = Twofold().eval()
    names = {**NAMES, Mixing: ("down",)}
    with (
        untouched(model),
        pytest.raises(UnsupportedModel, match=r"no input tried reaches images\.down: `dummy_inputs`"),
    ):
        find(model, names, 2)
    assert all(n.startswith("words.") for n in cuts(find(model, {}, 2).plan))


def test_tied_matrices_are_not_divided_for_one_user() -> None:
    model: Any = own()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    with untouched(model), pytest.raises(UnsupportedModel, match=r"blocks\.0\.up\.weight is blocks\.1\.up\.weight too"):
        find(model, NAMES, 2)
    assert set(cuts(find(model, {}, 2).plan, "blocks.1.")) == {n for n in BLOCK if n.startswith("attention")}


def test_a_replaced_forward_is_not_passed_over() -> None:
    model: Any = own()
    model.blocks[0].down.forward = model.blocks[0].down.forward
    with untouched(model), pytest.raises(UnsupportedModel, match=r"the forward of blocks\.0\.down has been replaced"):
        find(model, NAMES, 2)


def test_a_model_of_unknown_inputs_is_asked_for_them() -> None:
    model = reader()
    silent = type("Silent", (type(model),), {"dummy_inputs": None})
    model.__class__ = silent
    with untouched(model), pytest.raises(UnsupportedModel, match=r"an attribute `dummy_inputs`.*tried: 0 \(2, 11\)"):
        find(model, {}, 2)


def test_alone_a_stranger_is_refused_with_what_would_work() -> None:
    model = own().train()
    with untouched(model), pytest.raises(UnsupportedModel, match=r"Own, which has no .*mp_size=N.*tp_plan.*=False"):
        hasten.init_inference(model)
    with untouched(model), pytest.raises(ConfigError, match="'attention.put' is no linear of Block"):
        hasten.init_inference(model, injection_policy={Block: "attention.put"})


@pytest.mark.parametrize(("size", "parts"), [(3, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_shares_join_to_the_whole(size: int, parts: int, axis: int) -> None:
    whole = torch.arange(12 * 24).view(12, 24)
    cut = Cut("w", axis, parts)
    shares = [cut.own(whole, rank, size) for rank in range(size)]
    assert torch.equal(cut.join(shares), whole)
    run = whole.shape[axis] // parts
    assert all(torch.equal(s.narrow(axis, 0, 1), whole.narrow(axis, r * run // size, 1)) for r, s in enumerate(shares))
    assert cut.fits(6 * parts * size, size) and not cut.fits(6 * parts * size + 1, size)
    assert cut.fits(size * (parts + 1), size) == (parts == 1)


def test_what_counts_as_a_difference() -> None:
    want = torch.tensor([1.0, -2.0, torch.inf])

    def same(*got: float) -> bool:
        return apart(torch.tensor(got), want, REHEARSED) is None

    assert same(1.0, -2.0, torch.inf) and same(1.0001, -2.0, torch.inf)
    assert not same(1.001, -2.0, torch.inf)
    assert not same(1.0, -2.0, torch.nan) and not same(1.0, -2.0, 3.0) and not same(1.0, -2.0)
    assert apart(torch.tensor([3, 4]), torch.tensor([3, 5]), ON_RANKS) is not None
    wide = torch.randn(40, 4096).bfloat16()
    assert apart(wide * (1 + 2**-8), wide, REHEARSED) is not None  # as the norm of half as many features would be
    few = wide.clone()
    few[3, 4] += 1
    assert apart(few, wide, ON_RANKS) is not None
