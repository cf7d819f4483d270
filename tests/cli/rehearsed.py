"""What a mix of requests needs beyond a rehearsal: `python -m tests.cli.rehearsed MODEL` prints it."""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace
from typing import Any

import torch

import hasten.ops.triton  # noqa: F401 - registers the launchers
from hasten import ops
from hasten.bench.engines import Stand
from hasten.cli.rehearse import rehearse
from hasten.model import Transformer
from hasten.model.context import Dense
from hasten.model.packed import Packed
from hasten.ops import TABLE
from hasten.ops.triton.compiled import Variant, compiling, counting
from hasten.runtime.fixed import Kept
from hasten.runtime.paged import Paged, Slopes, Turns
from hasten.runtime.pools import Pools
from hasten.runtime.runs import Runs, padded
from hasten.runtime.steps import Steps

WAYS = ((), ("temperature",), ("temperature", "top_p"), ("temperature", "min_p", "top_k"))


def passes(model: Transformer, kept: Kept) -> None:
    """Prompts, pieces of prompts and single tokens of some sequences, as a runner has them."""
    rows: list[Any] = []
    for _ in range(random.choice((1, 2, 3, 5, 9, 20, 77, 180))):
        start = random.choice((0, 0, 5, 100))
        stop = start + random.choice((1, 1, 2, 17, 60, 300))
        rows.append(SimpleNamespace(start=start, stop=stop, sequence=SimpleNamespace(pages=list(range(64)))))
    count = sum(row.stop - row.start for row in rows)
    flat = torch.zeros(2 * count + len(rows), dtype=torch.int64)
    ids, places, sampled = flat.split([count, count, len(rows)])
    x = model.blocks(model.embed(ids, places), Paged(rows, places, kept.pools, kept.turns, kept.slopes))
    choose(model.predict(x[sampled] if len(rows) < count else x).float(), random.choice(WAYS))


def choose(logits: torch.Tensor, names: tuple[str, ...]) -> None:
    columns = Steps(len(logits), 1, KEPT).at
    c = ops.Choice(**{name: columns[name] for name in names})
    ops.sample(logits, c, torch.zeros(len(logits), dtype=torch.float64) if names else None, None, None)


def recorded(model: Transformer, kept: Kept) -> None:
    places, pages, way = 2 ** random.randrange(9), 2 ** random.randrange(5, 9), random.choice(WAYS)
    Steps(places, pages, kept).step(model, way)
    tokens = padded(random.randrange(1, 257))
    Runs(tokens, min(places, tokens), pages, kept).step(model, way)


def batches(model: Transformer) -> None:
    """Of an encoder, with padding, without, and with the padding taken out."""
    e, batch, tokens = model.tower.embed, random.choice((1, 2, 5, 16, 33)), random.choice((16, 31, 64, 100, 197, 333))
    ids = torch.zeros(batch, tokens, dtype=torch.int64)
    x = torch.zeros(batch, tokens, model.tower.width, dtype=torch.bfloat16)
    tokens_known = hasattr(e, "vocabulary")
    x = model.embed(ids, ids[:1], ids if getattr(e, "types", 0) else None) if tokens_known else x
    model.finish(model.blocks(x, Dense(ids, seen=random.choice((None, ids == 0)))))
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32)
    model.finish(model.blocks(x.flatten(0, 1), Packed(ids.flatten(), starts)))


def missing(model: Transformer, mixes: int) -> tuple[int, set[Variant]]:
    """How many variants a rehearsal found, and those of a mix that it did not."""
    with counting() as found:
        rehearse(model)
    random.seed(0)
    with counting() as met:
        for _ in range(mixes):
            if model.tower.head is None:
                batches(model)
            else:
                passes(model, KEPT)
                recorded(model, KEPT)
    assert met, "a mix needs kernels"
    return len(found), met - found


if __name__ == "__main__":
    for op in TABLE.values():  # as on a GPU
        op.serving["cpu"] = tuple(i for i in op.implementations if i.backend == "triton")
    with compiling(), torch.inference_mode():
        MODEL = Stand(sys.argv[1], torch.bfloat16, torch.device("cpu"), alone=True).engine.backbones[0].transformer
        weights = next(iter(MODEL.weights.values()))
        KEPT = Kept(Pools(MODEL.tower, 16, weights.dtype, weights.device, 2**24), Turns(), Slopes())
        KEPT.pools.hold(4)
        found, more = missing(MODEL, 40)
    json.dump({"found": found, "more": sorted(f"{v.kernel} {v.launch}" for v in more)}, sys.stdout)
