"""Triton's `qkv` around its kernel `turn_heads`, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.ops import Matrix, NormLayer, Slots, qkv, rope_table, use
from hasten.ops.triton import turn_heads as module
from hasten.spec import Rope
from tests.ops.arguments import attention, matrix, norm_layer, random, strided, tensors
from tests.ops.cases import CASES, convert
from tests.ops.test_triton import DTYPES, TOLERANCES, device, place

__all__ = ["device"]  # the fixture: interpreted or compiled

LAUNCHER = next(i for i in qkv.implementations if i.run.__module__ == module.__name__)


def check(arguments: tuple[Any, ...], device: str, dtype: torch.dtype, accepted: bool = True) -> None:
    """What `qkv` leaves behind, answer and pages, is what the reference leaves in float64."""
    wide = convert(arguments, torch.float64)
    with use("reference"):
        want = tensors(qkv(*wide)) + tensors(wide)
    placed = place_all(arguments, device)
    assert LAUNCHER.accepts(*placed) == accepted
    got = tensors(LAUNCHER.run(*placed)) + tensors(placed)
    for g, w in zip(got, want, strict=True):
        bound = TOLERANCES[dtype]
        torch.testing.assert_close(g.cpu().double(), w.double(), rtol=bound, atol=bound)


def place_all(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """`place`, for matrices and slots too."""
    return tuple(
        type(a)(**{f: place(getattr(a, f), device) for f in a.__slots__}) if isinstance(a, Matrix | Slots) else b
        for a, b in zip(arguments, place(arguments, device), strict=True)
    )


@DTYPES
@pytest.mark.parametrize("case", CASES["qkv"])
def test_answer_is_that_of_the_reference_in_float64(case: str, device: str, dtype: torch.dtype) -> None:
    bare = case in ("plain", "empty")  # nothing to do behind the product: its columns are the heads
    check(CASES["qkv"][case](dtype), device, dtype, accepted=not bare)


def of_heads(
    tokens: tuple[int, ...],
    heads: tuple[int, int, int],
    d: torch.dtype,
    rope: tuple[int, str] | None = None,
    own: NormLayer | None = None,
    **more: Any,
) -> tuple[Any, ...]:
    """Arguments of `qkv` from 12 columns to `heads` = (heads, kv_heads, head_dim)."""
    h, kv, dim = heads
    position = None if rope is None else Rope(rope[0], 100.0, rope[1])  # type: ignore[arg-type]
    a = attention(h, kv, dim, position=position, **more)
    turn = None if position is None else rope_table(position, torch.arange(5, 5 + tokens[-1]), 64)
    m = matrix(d, (h + 2 * kv) * dim, 12)
    return random(*tokens, 12, dtype=d), None, m, a, own, own, turn, None


@DTYPES
@pytest.mark.parametrize("pairing", ["halves", "neighbours"])
@pytest.mark.parametrize(
    "heads, turning",
    [((3, 1, 20), 20), ((5, 5, 80), 32), ((2, 1, 96), 96), ((3, 3, 24), 10), ((1, 1, 256), 64)],
    ids=str,
)
def test_every_width_of_heads_and_part_that_turns(
    pairing: str, heads: tuple[int, int, int], turning: int, device: str, dtype: torch.dtype
) -> None:
    norm = norm_layer(dtype, heads[2], kind="rms", bias=False)
    # angles of one sequence serve a batch of two
    for own in (None, norm):
        check(of_heads((2, 3), heads, dtype, (turning, pairing), own), device, dtype)


@DTYPES
@pytest.mark.parametrize("pairing", ["halves", "neighbours", None])
@pytest.mark.parametrize(
    "kind", [{"kind": "layer"}, {"kind": "rms", "bias": False, "wide": True, "offset": 1.0}], ids=str
)
def test_every_norm_of_heads_behind_a_clip(
    pairing: str | None, kind: dict[str, Any], device: str, dtype: torch.dtype
) -> None:
    rope = None if pairing is None else (12, pairing)
    check(of_heads((4,), (4, 2, 20), dtype, rope, norm_layer(dtype, 20, **kind), clip=0.7), device, dtype)


@DTYPES
def test_norm_of_the_width_behind_a_clip(device: str, dtype: torch.dtype) -> None:
    x, _, m, a, *_, into = of_heads((5,), (4, 2, 20), dtype, clip=0.7, qk_norm_span="width")
    q_norm, k_norm = (norm_layer(dtype, n, kind="rms", bias=False) for n in (80, 40))
    check((x, None, m, a, q_norm, k_norm, None, into), device, dtype)


def test_angles_given_for_every_token_of_a_batch(device: str) -> None:
    x, _, m, a, *_ = of_heads((2, 3), (3, 1, 20), torch.float32, (12, "halves"))
    turn = rope_table(a.position, torch.randint(0, 50, (2, 3)), 64)
    check((x, None, m, a, None, None, turn, None), device, torch.float32)
    column = tuple(t[:, :1] for t in turn)  # every token of a sequence at one position
    check((x, None, m, a, None, None, column, None), device, torch.float32)


def test_pages_of_another_dtype_whose_heads_lie_apart(device: str) -> None:
    x, _, m, a, *_, turn, _ = of_heads((5,), (4, 2, 20), torch.float32, (12, "neighbours"))
    keys, values = (torch.randn(3, 4, 4, 20).half()[:, :, 1:3] for _ in range(2))
    into = Slots(keys, values, torch.tensor([11, -1, 0, 5, 7]).int())
    check((x, None, m, a, None, None, turn, into), device, torch.float16)


def test_values_pass_through_bit_for_bit(device: str) -> None:
    x, _, m, a, *_, turn, _ = of_heads((4,), (4, 2, 20), torch.bfloat16, (12, "halves"))
    m = Matrix(torch.zeros_like(m.weight), m.bias)
    placed = place_all((x, None, m, a, None, None, turn, None), device)
    _, _, v = LAUNCHER.run(*placed)
    assert torch.equal(v.cpu(), m.bias[-40:].view(2, 20).expand(4, 2, 20))


@pytest.mark.parametrize("which", ["one norm", "two kinds of norm", "float64", "a pool with gaps"])
def test_other_arguments_are_not_served(which: str) -> None:
    x, before, m, a, _, _, turn, into = of_heads((4,), (4, 2, 20), torch.float32)
    q, k = None, None
    if which == "one norm":
        q = norm_layer(torch.float32, 20)
    elif which == "two kinds of norm":
        q, k = norm_layer(torch.float32, 20), norm_layer(torch.float32, 20, kind="rms", bias=False)
    elif which == "float64":
        x = x.double()
    else:
        into = Slots(*(strided(torch.zeros(2, 4, 2, 20)) for _ in range(2)), torch.zeros(4, dtype=torch.int64))
    assert not LAUNCHER.accepts(x, before, m, a, q, k, turn, into)
