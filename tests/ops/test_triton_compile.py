"""Triton's kernels compiled for Hopper without a GPU: what their machine code needs, as docs/kernels.md says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

DOCUMENT = Path(__file__).parents[2] / "docs/kernels.md"
SHARED = 227 * 1024  # bytes that one block may have on Hopper

# kernel -> registers of a thread, at most. 65,536 registers serve a processor's threads: 64 let 1,024 threads wait at
# once, which is plenty for the loads of a plain copy; the tiles of prompts want few threads with many registers.
REGISTERS = {"norm_rows": 64, "activate": 40, "rotate": 64, "store_slots": 40, "attend_tile": 224}
REGISTERS |= {"gemm_tile": 128, "gemm_tiles": 240, "settle_sums": 64, "attend_rows": 192}
REGISTERS |= {"embed_rows": 40, "advance_rows": 40, "survey_block": 64, "choose_token": 112}
REGISTERS |= {"weigh_digit": 112, "weigh_block": 112}
REGISTERS |= {"route_token": 64, "expert_up": 64, "expert_down": 128, "group_pairs": 64, "multiply_group": 176}
REGISTERS |= {"attend_token": 128, "gemv": 128, "gemv_qkv": 168}
REGISTERS |= {"multiply_tile": 192, "settle_rows": 64, "turn_heads": 64, "push_sum": 64}
FEW_NUMBERS = {"advance_rows", "choose_token", "weigh_digit"}  # they read a number a row, a block or a thread
FEW_NUMBERS |= {"push_sum"}  # a word a thread, to be sent at once
ONE_TOKEN_REGISTERS = 128  # four blocks of four warps on a processor while one token is attended for
SHORT_REGISTERS = 192  # a program holds every key there is, and there are few programs

SCRIPT = """
import json, sys
from dataclasses import asdict
from hasten.ops.triton.report import compile_all, compiled_table, predicted_table
rows = compile_all()
found = [{"op": s.op, "shape": s.shape, "dtype": str(s.dtype), **asdict(b)} for s, b in rows]
json.dump({"table": compiled_table(rows), "predicted": predicted_table(), "found": found}, sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Compiled in a process of its own, since TRITON_INTERPRET=1 makes kernels that cannot be."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=False, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def binaries(compiled: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return iter(compiled["found"])


def label(binary: dict[str, Any]) -> str:
    return f"{binary['op']} ({binary['shape']}, {binary['dtype']})"


def test_no_kernel_spills(binaries: Iterator[dict[str, Any]]) -> None:
    assert {label(b): b["spilled"] for b in binaries if b["spilled"]} == {}


def test_registers_leave_room_for_enough_threads(binaries: Iterator[dict[str, Any]]) -> None:
    for b in binaries:
        most = ONE_TOKEN_REGISTERS if b["shape"].endswith("1 token") else REGISTERS[b["kernel"]]
        most = SHORT_REGISTERS if b["shape"].endswith("short, 1 token") else most
        assert b["registers"] <= most, label(b)
        assert b["registers"] * b["warps"] * 32 <= 65536, label(b)


def test_shared_memory_fits_into_a_block(binaries: Iterator[dict[str, Any]]) -> None:
    assert {label(b): b["shared"] for b in binaries if b["shared"] > SHARED} == {}


def test_memory_is_read_sixteen_bytes_at_a_time(binaries: Iterator[dict[str, Any]]) -> None:
    assert [label(b) for b in binaries if not b["wide_loads"] and b["kernel"] not in FEW_NUMBERS] == []


def test_16_bit_attention_runs_on_tensor_cores(binaries: Iterator[dict[str, Any]]) -> None:
    found = [b for b in binaries if b["op"] == "attend_pages" and b["dtype"] != "torch.float32"]
    one_row = {b["shape"] for b in found if b["tensor_cores"] == "none"}
    assert one_row == {"12 on 12 x 64, 1 token", "25 on 25 x 64, short, 1 token"}  # narrow heads without groups
    assert {b["tensor_cores"] for b in found if "prompt" in b["shape"]} == {"HGMMA"}


def test_products_of_few_rows_ask_for_weights_before_they_wait_and_stream_them_past_the_registers(
    binaries: Iterator[dict[str, Any]],
) -> None:
    found = [b for b in binaries if b["kernel"] == "multiply_tile"]
    assert found
    for b in found:
        assert b["order"].startswith("PREEXIT UBLKPF ACQBULK LDGSTS.128*"), label(b)
        assert b["tensor_cores"] == ("none" if b["dtype"] == "torch.float32" else "HGMMA"), label(b)


def test_products_of_some_hundred_rows_ask_for_weights_before_they_wait(binaries: Iterator[dict[str, Any]]) -> None:
    found = [b for b in binaries if b["kernel"] == "gemm_tile"]
    assert found
    for b in found:
        before, after = b["order"].split(" ACQBULK ")
        assert before in ("PREEXIT UBLKPF", "PREEXIT UBLKPF*2"), label(b)  # of a gate, twice
        assert after.startswith("UTMALDG*"), label(b)


def test_products_of_one_row_load_all_their_weights_before_they_wait(binaries: Iterator[dict[str, Any]]) -> None:
    found = [b for b in binaries if b["kernel"] in ("gemv", "gemv_qkv")]
    assert {b["kernel"] for b in found} == {"gemv", "gemv_qkv"}
    for b in found:
        assert b["order"].startswith("PREEXIT "), label(b)
        early, late = b["order"].split(" ACQBULK ")
        assert "STG" not in early, label(b)
        assert wide_loads(early) >= 2, label(b)
        assert late.startswith("LDG"), label(b)
        assert wide_loads(late) <= wide_loads(early), label(b)  # x alone, of which a program has one row


def test_norms_load_their_weights_before_they_wait(binaries: Iterator[dict[str, Any]]) -> None:
    kernels = ("norm_rows", "settle_rows", "turn_heads")
    found = {label(b): b["order"] for b in binaries if b["kernel"] in kernels}
    with_norms = {name: order for name, order in found.items() if not name.startswith("qkv") or "norms" in name}
    early = {name for name, order in with_norms.items() if order.startswith("PREEXIT LDG.128")}
    assert set(with_norms) - early == {"settle (both norms, 16384, torch.float32)"}  # no registers for them


def test_a_step_loads_a_block_of_earlier_keys_before_it_waits_and_its_queries_after(
    binaries: Iterator[dict[str, Any]],
) -> None:
    found = [b for b in binaries if b["kernel"] == "attend_token"]
    assert found
    for b in found:
        assert b["order"].startswith("PREEXIT "), label(b)
        before, after = b["order"].split(" ACQBULK ")
        assert "STG" not in before, label(b)
        early, late = (wide_loads(part) for part in (before, after.split(" LDGSTS")[0]))
        assert early >= 2, label(b)
        assert late >= early, label(b)  # what is newest in the block; queries are few


def wide_loads(order: str) -> int:
    return sum(int(count or 1) for count in re.findall(r"LDG\.128(?:\*(\d+))?(?= |$)", order))


def test_every_op_with_a_kernel_is_compiled(binaries: Iterator[dict[str, Any]]) -> None:
    from hasten.ops import TABLE
    from hasten.ops.backends import load

    if "triton" not in load():
        pytest.skip("Triton's implementations register on a GPU or in the interpreter")
    with_kernel = {op.name for op in TABLE.values() if any(i.backend == "triton" for i in op.implementations)}
    found = list(binaries)
    assert {b["op"] for b in found} == with_kernel
    assert {b["kernel"] for b in found} == set(REGISTERS)


def test_the_document_shows_what_was_compiled(compiled: dict[str, Any]) -> None:
    """Line by line where this is the Triton that wrote it; another version makes other numbers of the same kernels."""
    text, title = DOCUMENT.read_text(), compiled["table"].splitlines()[0]
    if title in text:
        assert compiled["table"] in text, "run: python -m hasten.ops.triton.report docs/kernels.md"
    for b in compiled["found"]:
        assert f"| {b['op']} | {b['shape']} | {b['dtype'].removeprefix('torch.')} | `{b['kernel']}` |" in text


def test_the_document_shows_what_is_predicted(compiled: dict[str, Any]) -> None:
    assert compiled["predicted"] in DOCUMENT.read_text()


def test_interpreted_kernels_are_not_compiled_by_mistake() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hasten.ops.triton.report"],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "unset it before Python starts" in done.stderr
