"""Images cut into patches by a product give what the convolution gives, and other convolutions are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.inject import patches
from hasten.inject.patches import PatchesAsProducts, cuts, product


@pytest.mark.parametrize(("size", "window"), [((8, 8), (4, 4)), ((6, 12), (3, 2)), ((5, 5), (5, 5))], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
def test_a_product_gives_what_the_convolution_gives(size: Any, window: Any, bias: bool) -> None:
    conv = nn.Conv2d(3, 7, window, stride=window, bias=bias).double()
    x = torch.randn(2, 3, *size).double()
    got, want = product(x, conv.weight, conv.bias), conv(x)
    torch.testing.assert_close(got, want)
    got.flatten(2).transpose(1, 2).view(2, -1)  # lies as tokens (batch, patches, width) do


@pytest.mark.parametrize(
    "other",
    [{"stride": 2}, {"padding": 1}, {"padding": "same", "stride": 1}, {"dilation": 2}, {"groups": 3}, {"size": 9}],
    ids=str,
)
def test_other_convolutions_are_not_cuts(other: dict[str, Any]) -> None:
    size = other.pop("size", 8)
    conv = nn.Conv2d(3, 6, 4, **{"stride": 4, **other})
    x = torch.randn(1, 3, size, size)
    assert not cuts(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    plain = nn.Conv2d(3, 6, 4, stride=4)
    assert cuts(torch.randn(1, 3, 8, 8), plain.weight, plain.bias, plain.stride, plain.padding, plain.dilation, 1)


def test_modules_inside_take_the_product_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(patches, "product", lambda *a: made.append(1) or product(*a))
    conv, x = nn.Conv2d(3, 6, 4, stride=4), torch.randn(1, 3, 8, 8)
    with PatchesAsProducts():
        want = conv(x)  # on the CPU, and in float32, the convolution is as good
    assert not made
    monkeypatch.setattr(patches, "TENSOR_CORE", {torch.float32})
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    with PatchesAsProducts():
        got = conv(x)
    assert made
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_images_on_a_gpu() -> None:
    conv, x = nn.Conv2d(3, 64, 16, stride=16).cuda().half(), torch.randn(2, 3, 64, 48).cuda().half()
    with torch.no_grad(), PatchesAsProducts():
        got = conv(x)
    torch.testing.assert_close(got.float(), conv.float()(x.float()), atol=2e-3, rtol=2e-3)
