"""What a piece of work has to read and to multiply at least, from the tower's description alone."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.spec import Attention, Moe, Tokens, Tower
from hasten.weights import Param, params

LOOKED_UP = ("positions", "types")  # tables of which a token reads one row


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes read from memory, and operations (a multiplication and an addition are two)."""

    bytes: float
    flops: float


def step(t: Tower, itemsize: int, batch: int, context: float) -> Cost:
    """One token more for each of `batch` sequences that have `context` tokens each, on average over the steps."""
    weights = sum(_read(t, p, batch) for p in params(t)) * itemsize
    seen = [_seen(b.attention, context) for b in t.blocks]
    cached = sum(2 * b.attention.kv_width * n for b, n in zip(t.blocks, seen, strict=True)) * itemsize * batch
    scores = sum(4 * b.attention.q_width * n for b, n in zip(t.blocks, seen, strict=True)) * batch
    return Cost(weights + cached, _products(t, batch, batch) + scores)


def passage(t: Tower, itemsize: int, batch: int, tokens: int) -> Cost:
    """`batch` sequences of `tokens` tokens at once, with logits of each last token where there is a head."""
    rows = batch * tokens
    weights = sum(_read(t, p, rows) for p in params(t)) * itemsize
    scores = sum(4 * b.attention.q_width * _pairs(b.attention, tokens) for b in t.blocks) * batch
    return Cost(weights, _products(t, rows, batch) + scores)


def _seen(a: Attention, context: float) -> float:
    """Keys that a token looks at."""
    return context if a.window is None else min(context, a.window)


def _pairs(a: Attention, tokens: int) -> float:
    """Pairs of a query and a key that it looks at."""
    if not a.causal:
        return tokens * tokens
    reach = tokens if a.window is None else min(tokens, a.window)
    return reach * (reach + 1) / 2 + (tokens - reach) * reach


def _read(t: Tower, p: Param, rows: int) -> float:
    """Numbers of a parameter that are read for `rows` tokens."""
    size = _size(p)
    if p.slot in LOOKED_UP or (p.slot == "tokens" and not (t.head and t.head.tied)):
        assert isinstance(t.embed, Tokens)
        return min(rows, p.shape[0]) * p.columns[0]
    return size * (1 - (1 - _share(t, p)) ** rows)  # of experts: those that at least one token is expected to choose


def _products(t: Tower, rows: int, last: int) -> float:
    """Operations of all matrix products for `rows` tokens, `last` of which go through the head."""
    matrices = [p for p in params(t) if p.columns and p.slot not in (*LOOKED_UP, "tokens", "head", "buckets")]
    head = 0 if t.head is None or not isinstance(t.embed, Tokens) else t.embed.vocab * t.embed.width
    return 2 * (sum(_size(p) * _share(t, p) for p in matrices) * rows + head * last)


def _share(t: Tower, p: Param) -> float:
    """How much of a parameter one token takes part in: less than all of it for experts."""
    mlp = None if p.block is None else t.blocks[p.block].mlp
    return mlp.top_k / mlp.experts if p.stack and isinstance(mlp, Moe) else 1.0


def _size(p: Param) -> int:
    size = 1
    for n in p.shape:
        size *= n
    return size
