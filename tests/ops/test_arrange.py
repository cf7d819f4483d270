"""The host's part of a launch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
pytest.importorskip("triton.tools.tensor_descriptor", reason="older Tritons leave the work to torch's kernels")


@given(st.integers(0, 2**31), st.integers(1, 4096))
def test_sizes_are_rounded_up_as_triton_rounds_them(n: int, size: int) -> None:
    from hasten.ops.triton.arrange import cdiv, power_of_2

    assert cdiv(n, size) == triton.cdiv(n, size)
    assert power_of_2(n) == triton.next_power_of_2(n)


def test_tensors_that_want_a_gradient_or_float64_are_not_served_and_absent_ones_do_not_count() -> None:
    from hasten.ops.triton.arrange import served

    x, tracked = torch.ones(2), torch.ones(2, requires_grad=True)
    assert served(x, None)
    assert not served(x, x.double())
    assert not served(None, tracked)
    with torch.no_grad():
        assert served(tracked)
