"""Every reference and every implementation outside Triton, in three dtypes, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from hasten.ops import TABLE, use
from hasten.ops.table import Function, Op, always
from tests.ops.cases import CASES, convert, tensors

# dtype -> how far an answer of size s may lie from the float64 one: bound * (1 + s)
TOLERANCES = {
    torch.float32: 5e-6,  # sums of at most 64 terms of about one, 6e-8 each time they are rounded
    torch.float16: 5e-3,  # 4.9e-4 for a rounding, about ten of them in the longest region
    torch.bfloat16: 4e-2,  # 3.9e-3 for a rounding, likewise
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d)[6:])
Runner = tuple[Function, Callable[..., bool]]


def runners(op: Op) -> Iterator[tuple[str, Runner]]:
    """(name, (function, accepts)) of the reference and of each implementation that serves calls on the CPU."""
    yield "reference", (op.reference, always)
    for number, i in enumerate(op.implementations):
        if i.backend != "triton" and "cpu" in i.devices:
            yield f"{i.backend}-{number}", (i.run, i.accepts)


RUNNERS = [pytest.param(op, *one, id=f"{op.name}-{one[0]}") for op in TABLE.values() for one in runners(op)]
FASTER = [r for r in RUNNERS if r.values[1] != "reference"]


def outcome(run: Function, arguments: tuple[object, ...]) -> list[torch.Tensor]:
    """What a call leaves behind: its answer, and its arguments, which only an op that writes may have changed."""
    return tensors(run(*arguments)) + tensors(arguments)


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor], bound: float) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert not g.isnan().any()
        torch.testing.assert_close(g.double(), w.double(), rtol=bound, atol=bound)


@DTYPES
@pytest.mark.parametrize(("op", "name", "runner"), RUNNERS)
def test_answer_is_that_of_the_reference_in_float64(op: Op, name: str, runner: Runner, dtype: torch.dtype) -> None:
    run, accepts = runner
    for case, make in CASES[op.name].items():
        torch.manual_seed(0)
        arguments = make(dtype)
        if not accepts(*arguments):
            continue
        with use("reference"):
            want = outcome(op.reference, convert(arguments, torch.float64))
        with use("reference" if name == "reference" else None):
            got = outcome(run, arguments)
        try:
            assert_close(got, want, TOLERANCES[dtype])
        except AssertionError as error:
            raise AssertionError(f"{op.name} ({name}), case {case!r}: {error}") from error


@pytest.mark.parametrize("op", TABLE.values(), ids=lambda op: op.name)
def test_every_op_has_cases(op: Op) -> None:
    assert CASES.get(op.name), f"tests/ops/cases.py makes no arguments for {op.name}"


@pytest.mark.parametrize(("op", "name", "runner"), FASTER)
def test_some_case_reaches_every_implementation(op: Op, name: str, runner: Runner) -> None:
    run, _ = runner
    made = [make(dtype) for make in CASES[op.name].values() for dtype in TOLERANCES]
    assert any(run in served(op, arguments) for arguments in made), f"no case of {op.name} is served by {name}"


def served(op: Op, arguments: tuple[object, ...]) -> list[Function]:
    """What serves a call on the CPU, and what would where no compiler was."""
    taken = [i for i in op.serving["cpu"] if i.accepts(*arguments)]
    return [i.run for i in (*taken[:1], *[i for i in taken if i.backend != "native"][:1])]
