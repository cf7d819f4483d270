"""How many variants of each kernel the calls of a model make: `python -m tests.ops.variants` prints a table.

Sizes that differ from call to call are gone through, odd ones and powers of two among them; small integers come in
slices of one upload, which begin at any multiple of 8 bytes. Nothing is compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hasten.ops.triton  # noqa: F401 - registers the launchers
from hasten import ops
from hasten.ops import TABLE, Choice, EmbedLayer, Matrix, NormLayer, Slots, is_invariant
from hasten.ops.triton.compiled import Variant, compiling, counting
from hasten.ops.triton.samples import Mailed
from hasten.spec import Attention, Head, Mlp, Moe, Norm, Rope, Tokens

ROWS = (*range(1, 35), 63, 64, 65, 66, 100, 127, 128, 129, 200, 255, 256, 257, 300, 384, 385, 500, 512, 513, 640, 777)
ROWS += (1000, 1024, 1025, 1536, 2047, 2048, 3001, 4096)
BATCHES = ((1, 16), (1, 17), (1, 128), (2, 33), (3, 100), (4, 64), (5, 197), (8, 128), (16, 77), (32, 128), (64, 197))
SEQUENCES = (1, 2, 3, 5, 7, 8, 16, 17, 31, 64, 100, 128, 255, 256)
BF16 = torch.bfloat16
Call = tuple[str, tuple[Any, ...]]  # an op's name, and arguments


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a model that its calls share."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: Mlp
    norm: Norm
    vocabulary: int
    rope: Rope | None = None
    positions: int | None = None
    types: int = 0

    @property
    def attention(self) -> Attention:
        return Attention(self.heads, self.kv_heads, self.head_dim, self.head_dim**-0.5, True, "", position=self.rope)

    def matrix(self, height: int, columns: int) -> Matrix:
        return Matrix(rows(height, columns), rows(height) if self.norm.bias else None)

    def layer(self, width: int) -> NormLayer:
        return NormLayer(self.norm, rows(width), rows(width) if self.norm.bias else None)


def rows(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=BF16)


def numbers(count: int, at: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Some of an upload, `at` numbers behind its beginning."""
    return torch.zeros(at + count, dtype=dtype)[at:]


def embed(m: Model, t: int) -> Call:
    e = Tokens(m.vocabulary, m.width, positions=m.positions, types=m.types)
    positions, types = (rows(n, m.width) if n else None for n in (m.positions, m.types))
    layer = EmbedLayer(e, rows(m.vocabulary, m.width), positions, types)
    return "embed", (numbers(t, 0), numbers(t, t), numbers(t, 2 * t) if m.types else None, layer)


def norm(m: Model, t: int) -> Call:
    return "norm", (rows(t, m.width), m.layer(m.width))


def norm_of_heads(m: Model, t: int) -> Call:
    y = rows(t, (m.heads + 2 * m.kv_heads) * m.head_dim).narrow(1, 0, m.heads * m.head_dim)
    return "norm", (y.unflatten(-1, (m.heads, m.head_dim)), m.layer(m.head_dim))


def norm_of_batch(m: Model, batch: int, t: int) -> Call:
    return "norm", (rows(batch, t, m.width), m.layer(m.width))


def turn_of(m: Model, t: int) -> tuple[Tensor, Tensor] | None:
    return None if m.rope is None else torch.empty(t, m.rope.dim).chunk(2, -1)  # pyright: ignore[reportReturnType]


def qkv(m: Model, t: int) -> Call:
    """Of many tokens the product in front is another op's, which is not asked for here."""
    columns, height = m.width if t == 1 else 8, (m.heads + 2 * m.kv_heads) * m.head_dim
    before = m.layer(m.width) if t == 1 else None
    keys, values = rows(2, 64, 16, m.kv_heads, m.head_dim)
    into = Slots(keys, values, numbers(t, 3))
    x = torch.zeros(t, columns, dtype=BF16)
    return "qkv", (x, before, m.matrix(height, columns), m.attention, None, None, turn_of(m, t), into)


def rope(m: Model, t: int) -> Call:
    assert m.rope is not None
    cos, sin = torch.empty(t, m.rope.dim).chunk(2, -1)
    return "rope", (rows(t, m.heads, m.head_dim), cos, sin, m.rope)


def write_pages(m: Model, t: int) -> Call:
    y = rows(t, m.heads + 2 * m.kv_heads, m.head_dim)[:, m.heads :]
    return "write_pages", (*y.chunk(2, 1), *rows(2, 64, 16, m.kv_heads, m.head_dim), numbers(t, t % 3))


def linear(m: Model, t: int) -> Call:
    return "linear", (rows(t, m.width), m.matrix((m.heads + 2 * m.kv_heads) * m.head_dim, m.width))


def up(m: Model, t: int) -> Call:
    height = m.mlp.width * (2 if m.mlp.gated else 1)
    return "up", (rows(t, m.width), m.layer(m.width) if t == 1 else None, m.matrix(height, m.width), m.mlp)


def project(m: Model, columns: int, outer: bool, t: int) -> Call:
    n = m.layer(m.width) if outer else None
    return "project", (rows(t, columns), m.matrix(m.width, columns), rows(t, m.width), None, n, 1.0, None)


def head(m: Model, t: int) -> Call:
    before = m.layer(m.width) if t == 1 else None
    return "head", (rows(t, m.width), before, Matrix(rows(m.vocabulary, m.width)), Head(True))


def up_alone(m: Model, t: int) -> Call:
    height = m.mlp.width * (2 if m.mlp.gated else 1)
    return "up", (rows(t, m.width), None, m.matrix(height, m.width), m.mlp)


def vocabulary(m: Model, t: int) -> Call:
    return "linear", (rows(t, m.width), Matrix(rows(m.vocabulary, m.width)))


def settle(m: Model, t: int) -> Call:
    return "settle", (*rows(2, t, m.width), None, m.layer(m.width), 1.0, None)


def settle_over(m: Model, t: int) -> Call:
    return "settle_over", (*rows(2, t, m.width), None, None, 1.0, None, Mailed())


def curve(m: Model, t: int) -> Call:
    return ("gated", (rows(t, 2 * m.mlp.width), m.mlp.act)) if m.mlp.gated else ("act", (rows(t, m.mlp.width), "gelu"))


def prompts(m: Model, tokens: int, sequences: int, pages: int) -> Call:
    """Small integers one behind the other, as one upload brings them."""
    counts = (tokens, sequences + 1, sequences, sequences * pages)
    _, starts, lengths, tables = torch.zeros(sum(counts), dtype=torch.int64).split(counts)
    pools = rows(2, 64, 16, m.kv_heads, m.head_dim)
    q = rows(tokens, m.heads, m.head_dim)
    return "attend_pages", (q, *pools, tables.view(sequences, pages), starts, lengths, m.attention, None, None)


def steps(m: Model, sequences: int, pages: int) -> Call:
    tables, lengths = numbers(sequences * pages, 1, torch.int32), numbers(sequences, 3, torch.int32)
    pools = rows(2, 64, 16, m.kv_heads, m.head_dim)
    q = rows(sequences, m.heads, m.head_dim)
    return "attend_pages", (q, *pools, tables.view(sequences, pages), None, lengths, m.attention, None, None)


def attend(m: Model, shown: str, batch: int, t: int) -> Call:
    """shown: m, a mask of keys; b, a bias, and a mask of queries and keys."""
    q, k, v = rows(batch, t, 3 * m.heads, m.head_dim).split(m.heads, 2)
    mask = torch.empty(batch, 1, t if "b" in shown else 1, t, dtype=torch.bool) if shown else None
    return "attend", (q, k, v, m.attention, mask, torch.empty(1, m.heads, t, t) if "b" in shown else None, None)


def attend_packed(m: Model, batch: int, t: int) -> Call:
    q, k, v = rows(batch * t, 3 * m.heads, m.head_dim).split(m.heads, 1)
    return "attend_packed", (q, k, v, numbers(batch + 1, batch), m.attention, None)


def advance(_: Model, places: int, pages: int) -> Call:
    tokens, ids, positions, slots = (numbers(places, i) for i in range(4))
    lengths, tables, count = (numbers(n, n % 3, torch.int32) for n in (places, places * pages, 1))
    said = torch.empty(8, places, dtype=torch.int64)
    return "advance", (tokens, ids, positions, lengths, slots, tables.view(places, pages), 16, said, count)


def sample(m: Model, used: str, t: int) -> Call:
    """used: t temperature, k top-k, p top-p."""
    at = t % 2
    c = Choice(
        numbers(t, at, torch.float32) if "t" in used else None,
        top_k=numbers(t, at) if "k" in used else None,
        top_p=numbers(t, at, torch.float64) if "p" in used else None,
    )
    uniform = numbers(t, at, torch.float64) if used else None
    return "sample", (torch.empty(t, m.vocabulary), c, uniform, None, None)


def route(moe: Moe, width: int, t: int) -> Call:
    return "route", (rows(t, width), Matrix(rows(moe.experts, width)), moe)


def experts(moe: Moe, width: int, t: int) -> Call:
    inner = moe.expert.width
    stacks = (Matrix(rows(1, *shape).expand(moe.experts, -1, -1)) for shape in ((2 * inner, width), (width, inner)))
    shares, which = torch.zeros(t, moe.top_k), torch.zeros(t, moe.top_k, dtype=torch.int64)
    return "experts", (rows(t, width), shares, which, *stacks, moe)


RMS, LAYER = Norm("rms", 1e-6), Norm("layer", 1e-5, bias=True)
LLAMA = Model(4096, 32, 8, 128, Mlp(14336, "silu", True, False), RMS, 128256, rope=Rope(128, 5e5, "halves"))
GPT2 = Model(768, 12, 12, 64, Mlp(3072, "gelu_tanh", False, True), LAYER, 50257, positions=1024)
BERT = Model(768, 12, 12, 64, Mlp(3072, "gelu", False, True), LAYER, 30522, positions=512, types=2)
VIT = Model(1024, 16, 16, 64, Mlp(4096, "gelu", False, True), LAYER, 1000)
MIXTRAL = Moe(8, 2, Mlp(14336, "silu", True, False), True)
Make = Callable[..., Call]


def places() -> Iterator[tuple[int, int]]:
    yield from ((n, pages) for n in SEQUENCES for pages in (1, 7, 32, 64, 100, 512))


def lines() -> Iterator[tuple[int, int, int]]:
    """Tokens, sequences, and columns of the page table."""
    for sequences in SEQUENCES:
        for tokens in (n for n in ROWS if n > sequences):
            yield from ((tokens, sequences, pages) for pages in (1, 9, 64, 301))


def decoder(m: Model) -> Iterator[tuple[str, Make, list[tuple[int, ...]]]]:
    """A name, what makes a call, and the sizes to make it with."""
    counts: list[tuple[int, ...]] = [(n,) for n in ROWS]
    few: list[tuple[int, ...]] = [(n,) for n in ROWS if n <= 256]
    for make in (embed, norm, norm_of_heads, qkv, write_pages, linear, up, settle, curve):
        yield make.__name__, partial(make, m), counts
    yield "out", partial(project, m, m.heads * m.head_dim, False), counts
    yield "down", partial(project, m, m.mlp.width, False), counts
    yield "head", partial(head, m), few
    yield "prompts", partial(prompts, m), list(lines())
    yield "steps", partial(steps, m), list(places())
    yield "advance", partial(advance, m), [*places(), (1500, 32), (3000, 100)]
    for used in ("", "t", "tkp"):
        yield f"sample {used}".strip(), partial(sample, m, used), few


def encoder(m: Model) -> Iterator[tuple[str, Make, list[tuple[int, ...]]]]:
    counts: list[tuple[int, ...]] = [(n,) for n in ROWS]
    for make in (norm, linear, up, curve):
        yield make.__name__, partial(make, m), counts
    if m.types:
        yield "embed", partial(embed, m), counts
    yield "norm of a batch", partial(norm_of_batch, m), list(BATCHES)
    yield "out", partial(project, m, m.width, m.types > 0), counts
    yield "down", partial(project, m, m.mlp.width, m.types > 0), counts
    for shown in ("", "m", "mb"):
        yield f"attend {shown}".strip(), partial(attend, m, shown), list(BATCHES)
    yield "attend_packed", partial(attend_packed, m), list(BATCHES)


def invariant(m: Model) -> Iterator[tuple[str, Make, list[tuple[int, ...]]]]:
    """What differs where rows must not depend on each other."""
    counts: list[tuple[int, ...]] = [(n,) for n in ROWS]
    for make in (norm, linear, up_alone, settle):
        yield make.__name__, partial(make, m), counts
    yield "out", partial(project, m, m.heads * m.head_dim, False), counts
    yield "vocabulary", partial(vocabulary, m), counts
    yield "prompts", partial(prompts, m), list(lines())
    yield "steps", partial(steps, m), list(places())
    yield "sample t", partial(sample, m, "t"), [(n,) for n in ROWS if n <= 256]


def everything() -> Iterator[tuple[str, Make, list[tuple[int, ...]]]]:
    found = {"Llama": decoder(LLAMA), "GPT-2": decoder(GPT2), "BERT": encoder(BERT), "ViT": encoder(VIT)}
    for name, calls in found.items():
        yield from ((f"{name} {what}", make, sizes) for what, make, sizes in calls)
    counts: list[tuple[int, ...]] = [(n,) for n in ROWS]
    yield "Llama rope", partial(rope, LLAMA), counts
    yield "Llama settle_over", partial(settle_over, LLAMA), counts
    yield "Mixtral route", partial(route, MIXTRAL, 4096), [(n,) for n in ROWS if n <= 64]
    yield "Mixtral experts", partial(experts, MIXTRAL, 4096), counts


def launch(call: Call) -> None:
    """Through the first of Triton's launchers that accepts the call, if one does."""
    name, arguments = call
    for i in TABLE[name].implementations:
        if i.backend == "triton" and (i.invariant or not is_invariant()) and i.accepts(*arguments):
            i.run(*arguments)
            return


def count() -> list[tuple[str, str, int, int]]:
    """(calls, kernel, variants, launches) of every model's calls."""
    found: list[tuple[str, str, int, int]] = []
    with compiling():
        for what, make, sizes in everything():
            with counting() as variants:
                for size in sizes:
                    launch(make(*size))
            found += [(what, *row) for row in _by_kernel(variants)]
        for name, m in (("Llama", LLAMA), ("GPT-2", GPT2)):
            for what, make, sizes in invariant(m):
                with ops.invariant(), counting() as variants:
                    for size in sizes:
                        launch(make(*size))
                found += [(f"{name} {what}, batch-invariant", *row) for row in _by_kernel(variants)]
    return found


def _by_kernel(variants: set[Variant]) -> Iterator[tuple[str, int, int]]:
    for kernel in sorted({v.kernel for v in variants}):
        mine = [v for v in variants if v.kernel == kernel]
        yield kernel, len({v.key for v in mine}), len({v.launch for v in mine})


if __name__ == "__main__":
    json.dump(count(), sys.stdout)
