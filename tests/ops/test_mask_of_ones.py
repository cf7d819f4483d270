"""Encoders do not ask whether a padding mask hides anything: to Triton's attention a mask of ones is no mask."""

from __future__ import annotations

import pytest
import torch

from hasten.ops import attend, use
from tests.ops.arguments import attention

pytest.importorskip("triton", reason="Triton has no build for this platform")

from tests.ops.test_triton import DTYPES, INTERPRETED, device  # noqa: E402, F401 - a fixture


@DTYPES
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("sizes", [(2, 18), (1, 70)], ids=str)
def test_a_mask_of_ones_is_no_mask(
    sizes: tuple[int, int],
    biased: bool,
    device: str,  # noqa: F811
    dtype: torch.dtype,
) -> None:
    if not INTERPRETED and dtype == torch.float32:
        pytest.skip("float32 queries are torch's on a GPU")
    batch, tokens = sizes
    q, k, v = (torch.randn(batch, tokens, 3, 20).to(device, dtype) for _ in range(3))
    bias = torch.randn(1, 3, tokens, tokens, device=device) if biased else None
    mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=device)
    left = mask & (torch.arange(tokens, device=device) > 3)
    with use("triton"):
        bare, ones, some = (attend(q, k, v, attention(3, 3, 20), m, bias, None) for m in (None, mask, left))
        spread = attend(q, k, v.abs(), attention(3, 3, 20), None, bias, None)
    assert not torch.equal(bare, some)
    if biased and not INTERPRETED:
        # The compiler contracts the bias into other operations where a mask follows it. What that changes of a score is
        # far below a 16-bit number; but a share of attention may round to its other neighbour, and so may the answer.
        change, size = (ones.float() - bare.float()).abs(), spread.float() + bare.float().abs()
        assert (change <= torch.finfo(dtype).eps * size).all()
    else:
        assert torch.equal(bare, ones)
