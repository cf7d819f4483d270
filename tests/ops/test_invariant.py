"""Inside `ops.invariant()` a row's answer is the same bits whatever rows lie beside it: every op that decoders use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import ops
from hasten.errors import ConfigError
from hasten.ops import TABLE, Choice, EmbedLayer, Slots
from hasten.ops.backends import load
from hasten.spec import Attention, Head, Mlp, Rope, Tokens
from tests.ops.arguments import attention, matrix, norm_layer, random

pytest.importorskip("triton", reason="Triton has no build for this platform")
pytest.importorskip("triton.tools.tensor_descriptor", reason="older Tritons leave the work to torch's kernels")
load()

from tests.ops.test_triton import INTERPRETED, device, place  # noqa: E402, F401 - a fixture

ROOT = Path(__file__).parents[2]
FEW = (1, 2, 7, 65) if INTERPRETED else (1, 2, 7, 64, 65, 130, 300, 2048)
MOST = max(FEW)
F16 = torch.float16
# interpreted products of bfloat16 are float32's, whose order is not ours
NARROW = pytest.mark.parametrize("dtype", [F16] if INTERPRETED else [F16, torch.bfloat16], ids=lambda d: str(d)[6:])


def same(got: Any, want: Any) -> bool:
    """Whether two answers hold the same bits."""
    return all(torch.equal(bits(g), bits(w)) for g, w in zip(flat(got), flat(want), strict=True))


def bits(t: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.contiguous().view(kinds[t.element_size()]) if t.is_floating_point() else t


def flat(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, tuple) else (value,)
    return [part for part in parts if part is not None]


# ---- what takes rows, and nothing of a row but the row


@dataclass(frozen=True)
class Rows:
    """How to call an op with some rows of what was made for MOST of them; `shared` is what all rows share."""

    op: str
    make: Callable[[torch.dtype], Any]
    call: Callable[[Any, slice], tuple[Any, ...]]


def product(columns: int, depth: int, d: torch.dtype) -> tuple[Any, ...]:
    return random(MOST, depth, dtype=d), matrix(d, columns, depth), random(MOST, columns, dtype=d)


def with_norm(columns: int, depth: int, d: torch.dtype) -> tuple[Any, ...]:
    return (*product(columns, depth, d), norm_layer(d, depth, kind="rms", bias=False), norm_layer(d, columns))


TURN = Rope(16, 1e4, "halves")
HEADS = Attention(4, 2, 16, 0.25, True, "", position=TURN)


def made_qkv(d: torch.dtype) -> tuple[Any, ...]:
    keys, values = torch.zeros(2, MOST, 1, 2, 16, dtype=d)
    cos, sin = ops.rope_table(TURN, torch.arange(MOST), 0)
    return (*with_norm(128, 64, d), keys, values, cos, sin)


def call_qkv(t: Any, some: slice) -> tuple[Any, ...]:
    x, m, _, before, _, keys, values, cos, sin = t
    where = torch.arange(MOST, device=x.device)[some]
    return x[some], before, m, HEADS, None, None, (cos[some], sin[some]), Slots(keys, values, where)


def made_sample(d: torch.dtype) -> tuple[Any, ...]:
    vocabulary = 300 if INTERPRETED else 50257
    logits = random(MOST, vocabulary, dtype=torch.float32, scale=2.0).to(d)
    return logits, torch.linspace(0.0, 1.5, MOST), torch.rand(MOST, dtype=torch.float64)


CASES: dict[str, Rows] = {
    "linear": Rows("linear", lambda d: product(50, 144, d), lambda t, i: (t[0][i], t[1])),
    "linear, wide": Rows(
        "linear", lambda d: product(1000 if INTERPRETED else 16896, 144, d), lambda t, i: (t[0][i], t[1])
    ),
    "up": Rows(
        "up", lambda d: with_norm(96, 80, d), lambda t, i: (t[0][i], t[3], t[1], Mlp(96, "gelu_tanh", False, True))
    ),
    "up, gated": Rows(
        "up", lambda d: with_norm(96, 80, d), lambda t, i: (t[0][i], t[3], t[1], Mlp(48, "silu", True, True))
    ),
    "project": Rows(
        "project", lambda d: product(48, 144, d), lambda t, i: (t[0][i], t[1], t[2][i], None, None, 0.5, None)
    ),
    "project, norm": Rows(
        "project", lambda d: with_norm(48, 144, d), lambda t, i: (t[0][i], t[1], t[2][i], None, t[4], 1.0, None)
    ),
    "head": Rows("head", lambda d: with_norm(50, 64, d), lambda t, i: (t[0][i], t[3], t[1], Head(True, softcap=30.0))),
    "qkv": Rows("qkv", made_qkv, call_qkv),
    "norm": Rows("norm", lambda d: (random(MOST, 4096, dtype=d), norm_layer(d, 4096)), lambda t, i: (t[0][i], t[1])),
    "norm, narrow": Rows(
        "norm", lambda d: (random(MOST, 40, dtype=d), norm_layer(d, 40, kind="rms")), lambda t, i: (t[0][i], t[1])
    ),
    "settle": Rows(
        "settle",
        lambda d: (*random(2, MOST, 1024, dtype=d), norm_layer(d, 1024), norm_layer(d, 1024)),
        lambda t, i: (t[0][i], t[1][i], t[2], t[3], 1.0, None),
    ),
    "gated": Rows("gated", lambda d: (random(MOST, 600, dtype=d),), lambda t, i: (t[0][i], "silu")),
    "act": Rows("act", lambda d: (random(MOST, 300, dtype=d),), lambda t, i: (t[0][i], "gelu")),
    "embed": Rows(
        "embed",
        lambda d: (torch.arange(MOST) % 30, EmbedLayer(Tokens(30, 300), random(30, 300, dtype=d))),
        lambda t, i: (t[0][i], None, None, t[1]),
    ),
    "sample": Rows("sample", made_sample, lambda t, i: (t[0][i], Choice(t[1][i]), t[2][i], None, None)),
}


@NARROW
@pytest.mark.parametrize("case", CASES)
def test_rows_do_not_depend_on_how_many_there_are(case: str, dtype: torch.dtype, device: str) -> None:  # noqa: F811
    rows = CASES[case]
    made = place(rows.make(dtype), device)
    with ops.invariant():
        whole = flat(TABLE[rows.op](*rows.call(made, slice(0, MOST))))
        for count in FEW:
            for some in (slice(0, count), slice(MOST - count, MOST)):
                got = TABLE[rows.op](*rows.call(made, some))
                assert same(got, tuple(t[some] for t in whole)), f"{count} rows, {some}"


# ---- attention: prompts, their pieces and single tokens


SPECS = {
    "grouped": attention(4, 2, 16),
    "heads of their own": attention(3, 3, 24),
    "soft-cap and window": attention(4, 2, 16, softcap=20.0, window=70),
    "window in a block": attention(4, 1, 16, window=5),
    "one key for all": attention(20, 1, 16),
}


@dataclass(frozen=True)
class Memory:
    """Sequences of keys and values in pages, in no order, and the queries behind all of their tokens."""

    lengths: tuple[int, ...]
    q: list[Tensor]
    keys: Tensor
    values: Tensor
    tables: Tensor


def memory(a: Attention, lengths: tuple[int, ...], d: torch.dtype, page: int = 16) -> Memory:
    most = -(-max(lengths) // page)
    count = most * len(lengths)
    keys, values = random(2, count, page, a.kv_heads, a.head_dim, dtype=d)
    tables = torch.randperm(count).view(len(lengths), most).int()
    return Memory(lengths, [random(n, a.heads, a.head_dim, dtype=d) for n in lengths], keys, values, tables)


def attend(m: Memory, a: Attention, runs: Sequence[tuple[int, int, int]], steps: bool = False) -> list[Tensor]:
    """What queries first to last of sequences see, by runs (sequence, first, last) that lie end to end."""
    where = m.keys.device
    q = torch.cat([m.q[r][first:last] for r, first, last in runs])
    counts = [last - first for _, first, last in runs]
    starts = None if steps else torch.tensor([0, *counts], device=where).cumsum(0).int()
    lengths = torch.tensor([last for _, _, last in runs], device=where).int()
    tables = m.tables[[r for r, _, _ in runs]]
    with ops.invariant():
        out = ops.attend_pages(q, m.keys, m.values, tables, starts, lengths, a, None, None)
    return list(out.split(counts))


@NARROW
@pytest.mark.parametrize("spec", SPECS)
def test_a_query_sees_the_same_alone_in_a_prompt_and_in_any_piece(
    spec: str,
    dtype: torch.dtype,
    device: str,  # noqa: F811
) -> None:
    a, lengths = SPECS[spec], (100, 3, 70) if INTERPRETED else (1500, 3, 700, 64, 65, 128)
    m = place(memory(a, lengths, dtype), device)
    m = replace(m, q=[place(q, device) for q in m.q])
    whole = attend(m, a, [(r, 0, n) for r, n in enumerate(lengths)])
    n = lengths[0]
    for cut in (1, 64, n - 1):
        pieces = [*attend(m, a, [(1, 2, 3), (0, 0, cut)])[1:], *attend(m, a, [(0, cut, n), (2, 60, 70)])[:1]]
        assert same(torch.cat(pieces), whole[0]), f"cut at {cut}"
    for at in (0, 15, 63, 64, n - 1):
        (alone,) = attend(m, a, [(0, at, at + 1)], steps=True)
        assert same(alone[0], whole[0][at]), f"token {at}"
    beside = attend(m, a, [(r, length - 1, length) for r, length in enumerate(lengths)], steps=True)
    assert all(same(b[0], w[-1]) for b, w in zip(beside, whole, strict=True))


# ---- what serves, and what does not


def test_only_what_says_so_serves_and_the_rest_is_an_error(device: str) -> None:  # noqa: F811
    x, m = place((random(5, 64, dtype=F16), matrix(F16, 32, 64)), device)
    with ops.invariant():
        assert ops.is_invariant()
        for op in TABLE.values():
            for i in op.implementations:
                assert not i.invariant or i.backend == "triton", f"{i.backend} {op.name}"
        assert ops.linear.choose(x, m).__module__ == "hasten.ops.triton.many_rows"
        wide = place((random(5, 64, dtype=torch.float64), matrix(torch.float64, 32, 64)), device)
        with pytest.raises(ConfigError, match="linear has no batch-invariant implementation for torch.float64"):
            ops.linear(*wide)
    assert not ops.is_invariant()


def test_a_row_without_filters_is_drawn_as_beside_one_with_filters(device: str) -> None:  # noqa: F811
    logits, temperature, uniform = place(made_sample(torch.bfloat16), device)
    temperature = temperature.clamp(min=0.1)
    off, on = torch.zeros_like(temperature), torch.full_like(temperature, 0.05)
    on[0] = 0.0
    with ops.invariant():
        alone = ops.sample(logits[:1], Choice(temperature[:1]), uniform[:1], None, None)
        beside = ops.sample(logits.float(), Choice(temperature, min_p=on), uniform, None, None)
        plain = ops.sample(logits, Choice(temperature, min_p=off), uniform, None, None)
        assert same(alone, beside[:1])
        assert same(ops.sample(logits, Choice(temperature), uniform, None, None), plain)


def test_a_draw_without_filters_takes_the_launches_that_filters_take(
    device: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hasten.ops.triton import sample

    asked: list[bool] = []
    keeps = sample.keeps
    monkeypatch.setattr(sample, "keeps", lambda s, c: asked.append(s.logits.dtype == torch.float32) or keeps(s, c))
    logits, temperature, uniform = place(made_sample(F16), device)
    with ops.use("triton"):
        ops.sample(logits[:2], Choice(temperature[:2]), uniform[:2], None, None)
    assert asked == []
    with ops.invariant():
        ops.sample(logits[:2], Choice(temperature[:2]), uniform[:2], None, None)
    assert asked == [True]


# ---- tiles of several heights are one arithmetic: the compiler's own word for it


SCRIPT = r"""
import json, re, sys, tempfile
import torch
import hasten.ops.triton
from hasten import ops
from hasten.ops import TABLE, Matrix
from hasten.ops.triton.compiled import _cuobjdump, compiling
from hasten.spec import Mlp

def instructions(op, *arguments):
    run = next(i.run for i in TABLE[op].implementations if i.invariant and i.accepts(*arguments))
    with compiling() as driver:
        run(*arguments)
    (_, _, cubin, _), = driver.loaded
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return re.findall(r"\bHG?MMA[.][\w.]+", _cuobjdump("-sass", file.name))

def rows(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16)

found = {}
with ops.invariant():
    for count in (1, 64, 65, 4096):
        for width, depth in ((4096, 4096), (14336, 1024), (50257, 768)):
            found[f"linear {width}, {count}"] = instructions("linear", rows(count, depth), Matrix(rows(width, depth)))
        mlp = Mlp(14336, "silu", True, False)
        found[f"up, {count}"] = instructions("up", rows(count, 4096), None, Matrix(rows(28672, 4096)), mlp)
json.dump(found, sys.stdout)
"""


def test_tiles_of_both_heights_take_the_same_matrix_instructions_in_the_same_number() -> None:
    """So an element is the same sum of the same products in the same order, whichever serves."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    for what in {name.rpartition(", ")[0] for name in found}:
        few, *others = (found[f"{what}, {count}"] for count in (1, 64, 65, 4096))
        assert len(few) == (8 if what == "up" else 4), what  # of a step of 64 columns, 16 at a time
        assert all(re.fullmatch(r"HGMMA\.64x\d+x16\.F32\.BF16", i) for i in few), what
        assert all(other == few for other in others), what
