"""The table: who may register, who serves a call, and what `use` and `explain` say."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.ops import TABLE, use
from hasten.ops.table import Op


def doubled(x: Tensor, times: int) -> Tensor:
    """x, times as often."""
    return x * times


@pytest.fixture
def made() -> Op:
    """An op of its own, outside the table."""
    return Op("doubled", doubled, inspect.signature(doubled))


def add(made: Op, backend: str, devices: str = "cpu", at_most: int = 99) -> None:
    """Register an implementation that answers with `named(backend)`."""

    @made.register(backend, devices=devices, accepts=lambda x, times: times <= at_most)
    def _(x: Tensor, times: int) -> Tensor:
        return torch.tensor(named(backend))


def named(backend: str) -> int:
    return sum(map(ord, backend))


X = torch.ones(2)


def test_first_registered_that_accepts_serves_the_call(made: Op) -> None:
    assert made(X, 3).tolist() == [3, 3]
    add(made, "small", at_most=2)
    add(made, "large")
    add(made, "late")
    assert made(X, 2) == named("small")
    assert made(X, 3) == named("large")


def test_keyword_arguments_reach_accepts_and_the_implementation(made: Op) -> None:
    add(made, "small", at_most=2)
    assert made(X, times=2) == named("small")
    assert made(X, times=3).tolist() == [3, 3]


def test_implementation_for_another_device_is_passed_over(made: Op) -> None:
    add(made, "far", devices="cuda meta")
    assert made(X, 3).tolist() == [3, 3]
    assert made(X.to("meta"), 3) == named("far")


def test_other_signature_is_refused_and_both_are_named(made: Op) -> None:
    with pytest.raises(TypeError, match=r"mine doubled\(x: 'Tensor'\).*differs.*times: 'int'"):

        @made.register("mine", devices="cpu")
        def _(x: Tensor) -> Tensor:
            return x

    assert made.implementations == []


def test_forced_backend_serves_or_fails_by_name(made: Op) -> None:
    add(made, "small", at_most=2)
    add(made, "large")
    with use("large"):
        assert made(X, 2) == named("large")
    with use("reference"):
        assert made(X, 2).tolist() == [2, 2]
    with use("small"), pytest.raises(ConfigError, match="doubled has no small implementation for torch.float32 on cpu"):
        made(X, 3)


def test_use_nests_and_ends_with_its_block_even_after_an_error(made: Op) -> None:
    add(made, "fast")
    with use("reference"):
        with use(None):
            assert made(X, 2) == named("fast")
        assert made(X, 2).tolist() == [2, 2]
    with pytest.raises(KeyError), use("reference"):
        raise KeyError
    assert made(X, 2) == named("fast")


def test_interpreted_kernels_serve_only_when_asked_for(made: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    add(made, "triton", devices="cuda")
    assert made(X, 2).tolist() == [2, 2]
    assert made.explain(X, 2)[0] == ("triton", "interpreted: only when asked for")
    with use("triton"):
        assert made(X, 2) == named("triton")


def test_kernels_that_are_compiled_never_see_the_cpu(made: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    add(made, "triton", devices="cuda")
    with use("triton"), pytest.raises(ConfigError, match="no triton implementation"):
        made(X, 2)


def test_explain_lists_every_candidate_and_why(made: Op) -> None:
    add(made, "far", devices="cuda")
    add(made, "small", at_most=2)
    add(made, "large")
    add(made, "late")
    assert made.explain(X, 3) == [
        ("far", "runs on cuda"),
        ("small", "does not accept these arguments"),
        ("large", "chosen"),
        ("late", "not first"),
        ("reference", "not first"),
    ]
    with use("reference"):
        assert made.explain(X, 3)[-1] == ("reference", "chosen")


@pytest.mark.parametrize("op", TABLE.values(), ids=lambda op: op.name)
def test_every_op_states_its_contract_and_keeps_its_name(op: Op) -> None:
    assert inspect.getdoc(op.reference)
    assert TABLE[op.reference.__name__] is op
