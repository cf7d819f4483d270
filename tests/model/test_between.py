"""Between sublayers: a norm that comes with the sum in front of it is not taken again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.model.stack import stack
from hasten.ops import invariant, use
from hasten.ops.table import Implementation
from hasten.spec import Mlp, Moe
from tests.ops.arguments import random
from tests.ops.stack_cases import LAYER_NORM, context, layers, stack_case

NORMS = {"pre": 3, "post": 0, "sandwich": 3, "reordered": 0, "parallel": 1, "parallel-shared": 1}


class Beside:
    """Gives the norm of every sum, `factor` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.factor = 0, 1.0
        made = Implementation("beside", self.run, frozenset(("cpu",)), lambda *a: True)
        monkeypatch.setitem(ops.project_normed.serving, "cpu", (made,))

    def run(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        y = ops.project(*arguments[:-1])
        return y, self.factor * ops.norm(y, arguments[-1])


@pytest.mark.parametrize("order", NORMS)
def test_each_order_uses_the_norms_that_follow_a_sum(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, s, ctx = stack_case(replace(LAYER_NORM, order=order), torch.float64)
    with use("reference"):
        want = stack.reference(x, s, ctx)
    beside = Beside(monkeypatch)
    torch.testing.assert_close(stack.reference(x, s, ctx), want)
    assert beside.calls == NORMS[order]
    beside.factor = 2.0
    assert stack.reference(x, s, ctx).allclose(want) == (NORMS[order] == 0)


@pytest.mark.parametrize("order", ["pre", "parallel"])
def test_experts_take_their_norms_themselves(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = replace(LAYER_NORM, order=order, mlp=Moe(3, 2, Mlp(45, "gelu", False, True), True)), LAYER_NORM
    x, s = random(3, 32, dtype=torch.float64), layers(32, blocks, torch.float64)
    ctx = context(blocks, (4, 1, 2), (1, 1, 1), 4, torch.float64)
    with use("reference"):
        want = stack.reference(x, s, ctx)
    beside = Beside(monkeypatch)
    torch.testing.assert_close(stack.reference(x, s, ctx), want)
    assert beside.calls == 1  # within the second block


def test_who_asks_for_a_backend_or_for_invariance_gets_sums_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, s, ctx = stack_case(LAYER_NORM, torch.float64)
    beside = Beside(monkeypatch)
    with use("reference"):
        want = stack.reference(x, s, ctx)
    assert beside.calls == 0
    with invariant(), pytest.raises(Exception, match="batch-invariant"):
        stack.reference(x, s, ctx)
    assert beside.calls == 0
    torch.testing.assert_close(stack.reference(x, s, ctx), want)
