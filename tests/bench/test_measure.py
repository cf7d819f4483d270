"""A run measures what can be measured, each model loaded once, and says what it left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hasten.bench import measure
from hasten.bench.ceilings import Ceilings
from hasten.bench.engines import Native, Stand
from hasten.bench.measure import Bench
from hasten.bench.peers import PEERS, Peer
from hasten.bench.start import Start, run
from hasten.bench.work import Work

CPU = torch.device("cpu")
ENCODE = Work("encode", "tiny-bert", torch.float32, prompt=7)
DECODE = Work("decode", "tiny-llama", torch.float32, prompt=5, new=4)


@pytest.fixture
def bench(ceilings: Ceilings) -> Bench:
    return Bench(CPU, ceilings, ("transformers", "live"), 2)


def left_out(bench: Bench) -> list[str]:
    return [n for n in bench.notes if "left out" in n]


def test_engines_are_measured_side_by_side_and_against_the_ceilings(bench: Bench) -> None:
    turns: list[int] = []
    bench.advance = lambda: turns.append(1)
    found = {w: results for w, results in bench.measure([DECODE, replace(DECODE, kind="generate"), ENCODE])}
    assert [[r.engine for r in results] for results in found.values()] == [
        ["transformers", "hasten"],
        ["transformers", "transformers' generate() on hasten", "hasten"],
        ["transformers", "hasten"],
    ]
    for w, results in found.items():
        assert {r.work for r in results} == {str(w)}
        assert {r.unit for r in results} == {w.unit}
        assert all(r.least <= r.value <= r.most for r in results)
        assert all(r.of in ("GB/s", "TFLOP/s") and r.share is not None for r in results)
    assert {r.runs for r in found[ENCODE]} == {8}
    assert len(turns) == 2 * 2 + 3 * 2 + 2 * 8
    assert left_out(bench) == []
    assert [n for n in bench.notes if n.startswith("tiny-llama fp32: decode steps run ")] == bench.notes
    assert not bench.failed


def test_a_model_is_made_once_for_all_its_works(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    closed: list[str] = []
    here, there = Stand.__init__, Stand.close
    monkeypatch.setattr(Stand, "__init__", lambda s, *a, **k: (made.append(a[0]), here(s, *a, **k))[1])
    monkeypatch.setattr(Stand, "close", lambda s: (closed.append(s.name), there(s))[1])
    list(bench.measure([DECODE, replace(DECODE, batch=2), ENCODE]))
    assert made == closed == ["tiny-llama", "tiny-bert"]


def test_peers_that_are_not_here_are_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "vllm", replace(PEERS["vllm"], needs=("no_such_module",)))
    bench.peers = ("vllm",)
    (found,) = [results for _, results in bench.measure([DECODE])]
    assert [r.engine for r in found] == ["hasten"]
    assert left_out(bench) == ["vLLM left out: no_such_module cannot be imported here"]
    assert not bench.failed


def test_a_peer_that_breaks_leaves_the_others_alone(
    bench: Bench, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmade(stand: Stand) -> Any:
        raise ImportError("libcuda\nis missing")

    serves = frozenset({"decode"})
    monkeypatch.setitem(PEERS, "breaks", Peer("breaks", serves, lambda s: recorder(fails="no kernel")))
    monkeypatch.setitem(PEERS, "unmade", Peer("unmade", serves, unmade))
    bench.peers = ("breaks", "unmade")
    (found,) = [results for _, results in bench.measure([DECODE])]
    assert [r.engine for r in found] == ["hasten"]
    assert left_out(bench) == [
        f"{DECODE}: unmade left out: ImportError: libcuda",
        f"{DECODE}: breaks left out: RuntimeError: no kernel",
    ]
    assert not bench.failed


def test_hasten_breaking_fails_the_run_and_not_the_other_works(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Native.generate

    def breaks(self: Native, prompts: list[list[int]], new: list[int]) -> Any:
        if len(prompts) == 2:
            raise RuntimeError("an illegal memory access")
        return here(self, prompts, new)

    monkeypatch.setattr(Native, "generate", breaks)
    found = [[r.engine for r in results] for _, results in bench.measure([replace(DECODE, batch=2), DECODE])]
    assert found == [["transformers"], ["transformers", "hasten"]]
    assert bench.failed
    assert "hasten left out: RuntimeError: an illegal memory access" in bench.notes[0]


def test_where_two_copies_have_no_room_hasten_is_measured_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stand, "alone", True)
    (found,) = [results for _, results in bench.measure([DECODE])]
    assert [r.engine for r in found] == ["hasten"]
    assert left_out(bench) == ["transformers left out: tiny-llama leaves no memory for a second copy"]


def test_the_engine_has_a_copy_of_its_own_unless_it_is_alone() -> None:
    shared = Stand("tiny-bert", torch.float32, CPU)
    assert shared.engine.module is not shared.model
    lone = Stand("tiny-bert", torch.float32, CPU, alone=True)
    assert lone.engine.module is lone.model
    lone.close()
    assert "model" not in vars(lone)


def test_hasten_is_profiled_where_that_is_asked_for(bench: Bench) -> None:
    bench.profiles = []
    list(bench.measure([DECODE, ENCODE]))
    assert [p.splitlines()[0] for p in bench.profiles] == [f"### {DECODE}", f"### {ENCODE}"]
    assert all("| `aten::" in p for p in bench.profiles)


def test_a_start_is_measured_in_a_process_of_its_own(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What that process tells is made up here; `hasten bench --quick` starts a real one."""
    told = Start(3.0, 2.0, 0.5, 0.25, 0.125, 0.0625, 0.75, 5.75)
    monkeypatch.setattr(measure.start, "measure", lambda w, device: told)
    (found,) = [results for _, results in bench.measure([replace(DECODE, kind="start")])]
    assert [(r.engine, r.value, r.unit) for r in found] == [
        ("hasten, from the start of the process", 5.75, "s"),
        ("hasten", 0.75, "s"),
    ]
    assert "init inference 0.50 s, first token 0.25 s" in bench.notes[0]


def test_a_start_adds_up() -> None:
    s = run("tiny-llama", "fp32", "cpu", 5, 0.0)
    assert min(s.model, s.init_inference, s.first_token, s.two_tokens, s.again) > 0
    assert s.ready == pytest.approx(s.init_inference + s.first_token)
    assert s.process == pytest.approx(s.imports + s.model + s.ready, abs=1e-3)


def test_loading_is_measured_from_files(bench: Bench) -> None:
    for name in ("tiny-llama", "tiny-bert"):
        ((w, results),) = bench.measure([Work("load", name, torch.bfloat16)])
        assert [(r.work, r.engine, r.unit, r.runs) for r in results] == [
            (f"load {name} bf16", "transformers", "s", 2),
            (f"load {name} bf16", "hasten", "s", 2),
        ]
        assert all(r.attained is not None and r.of == "GB/s" and r.value > 0 for r in results)
    bench.peers = ()
    ((_, results),) = bench.measure([w])
    assert [r.engine for r in results] == ["hasten"]
    assert left_out(bench) == []
