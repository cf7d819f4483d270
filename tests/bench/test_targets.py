"""The standard benchmark's table, and the verdicts over what a run found."""

from __future__ import annotations

import torch

from hasten.bench.peers import HASTEN, PEERS
from hasten.bench.targets import Target, standard
from hasten.bench.timing import Result
from hasten.bench.work import Work

W = Work("decode", "gpt2", torch.float16)
FAST = Target(W, must=2.0, aim=1.0)
RATE = Target(Work("offline", "gpt2", torch.float16), must=100.0, aim=200.0)


def found(t: Target, value: float, engine: str = "hasten") -> Result:
    return Result(str(t.work), engine, value, value, value, t.work.unit, 1)


def test_a_bound_is_reached_from_the_right_side() -> None:
    assert [FAST.verdict([found(FAST, v)]) for v in (0.9, 1.0, 1.5, 2.0, 2.1)] == ["aim", "aim", "must", "must", "MISS"]
    assert [RATE.verdict([found(RATE, v)]) for v in (250.0, 200.0, 150.0, 99.0)] == ["aim", "aim", "must", "MISS"]


def test_others_and_other_works_do_not_count() -> None:
    assert FAST.verdict([found(FAST, 0.5, "transformers"), found(RATE, 0.5)]) == "not measured"


def test_a_bound_beside_a_peer_needs_the_peer_in_the_run() -> None:
    t = Target(W, beside={"vLLM": (0.85, 0.8)})
    assert t.verdict([found(t, 5.0)]) == "-"
    assert [t.verdict([found(t, v), found(t, 10.0, "vLLM")]) for v in (7.9, 8.4, 8.6)] == ["aim", "must", "MISS"]


def test_the_standard_table_holds_together() -> None:
    source, targets = standard()
    assert "H100 80GB HBM3, 2026-11-23" in source
    titles = {p.title for p in (*PEERS.values(), HASTEN)}
    for t in targets:
        assert {*t.peers, *t.beside} <= titles
        assert (t.must is None) == bool(t.beside)
        if t.must is not None and t.aim is not None:
            assert t.aim > t.must if t.work.unit == "tokens/s" else t.aim < t.must
        t.work.check()
    models = [t.work.model for t in targets]
    assert [m for i, m in enumerate(models) if models.index(m) == i or models[i - 1] == m] == models  # loaded once each
