"""What the compiler makes of the kernels, read without a GPU: registers, spills, shared memory, instructions.

A driver that compiles and never launches stands in for the CUDA driver, so that every op's own launcher, on tensors of
real shapes, decides what is compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import groupby, repeat
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from hasten.errors import ConfigError

HOPPER = GPUTarget("cuda", 90, 32)
HOPPER_SHARED = 232448  # bytes of shared memory that one block may have


@dataclass(frozen=True, slots=True)
class Binary:
    """One compiled kernel."""

    kernel: str
    warps: int
    registers: int  # of each thread
    spilled: int  # bytes of each thread's registers that lie in memory
    shared: int  # bytes, of each block
    wide_loads: int  # instructions that load 16 bytes, or a tile
    tensor_cores: str  # the widest matrix instruction: HGMMA, HMMA or none
    order: str  # what touches memory around the wait for the kernel before: "PREEXIT LDG.128*8 ACQBULK LDG*4 STG"


class CompilingDriver(DriverBase):
    """Compiles for a device that need not be there, keeps the machine code and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.loaded: list[tuple[str, int, bytes, int]] = []  # name, warps, cubin, shared bytes
        self.warps = 0
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: {"max_shared_mem": HOPPER_SHARED}
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.warps = metadata.num_warps
        return lambda *args: None

    def _load(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        self.loaded.append((name, self.warps, cubin, shared))
        return None, None, 0, 0, 1024  # no handle, so that the next launch loads it, and is seen, again

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError("a compiling driver has no device")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("a compiling driver measures no time")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("a compiling driver builds no launcher")


@contextmanager
def compiling(target: GPUTarget = HOPPER) -> Iterator[CompilingDriver]:
    """Inside, launching a kernel compiles it for the target and runs nothing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError("TRITON_INTERPRET=1 makes kernels that cannot be compiled; unset it before Python starts")
    driver = CompilingDriver(target)
    triton.runtime.driver.set_active(driver)
    try:
        yield driver
    finally:
        triton.runtime.driver._active = None  # the next launch looks for the real one


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of a kernel, which takes a compilation of its own.

    launch: what has to differ for that: numbers known to the compiler, dtypes, which tensors there are, warps, stages.
    """

    kernel: str
    launch: tuple[str, ...]
    key: str
    module: str
    recipe: str = field(compare=False)  # what Triton's `preload` takes


@contextmanager
def counting() -> Iterator[set[Variant]]:
    """Inside, launching a kernel that this process has not compiled notes its variant; it is not compiled, nor runs."""
    hooks: Any = getattr(getattr(triton, "knobs", None), "runtime", None)
    if not hasattr(hooks, "jit_cache_hook"):
        raise ConfigError(f"Triton {triton.__version__} has no knobs.runtime.jit_cache_hook, which 3.4 to 3.7 have")
    found: set[Variant] = set()

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launch = _launch(fn.jit_function, compile)
        found.add(Variant(fn.name, launch, key, fn.module, compile["specialization_data"]))
        return True

    before, hooks.jit_cache_hook = hooks.jit_cache_hook, note
    try:
        yield found
    finally:
        hooks.jit_cache_hook = before


def current_target() -> GPUTarget:
    """What kernels are compiled for on the current device."""
    return triton.runtime.driver.active.get_current_target()


def compile_all(variants: Collection[Variant], target: GPUTarget, processes: int) -> None:
    """Compile them into Triton's cache, beside each other: compiling takes processors, and no GPU."""
    started = get_context("spawn")  # a fork would share the device of this process
    with ProcessPoolExecutor(max(min(processes, len(variants)), 1), started) as pool:
        list(pool.map(_compile, variants, repeat(target)))


def _compile(v: Variant, target: GPUTarget) -> None:
    with compiling(target):
        kernel = getattr(import_module(v.module), v.kernel).preload(v.recipe)
    if torch.cuda.is_available():  # a run of the C compiler, whose result lies in the cache too
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)


def _launch(kernel: Any, made: dict[str, Any]) -> tuple[str, ...]:
    """A 1 is an integer here, and integers are all alike, since it is their values that must not make variants."""
    types, values = made["signature"], made["constants"]
    parts = [str(kernel.do_not_specialize), f"{made['num_warps']} warps", f"{made['num_stages']} stages"]
    for i, p in enumerate(kernel.params):
        known = values.get((i,)) if types[p.name] == "constexpr" else types[p.name]
        integer = not p.is_constexpr and re.fullmatch(r"1|[iu]\d+", str(known)) is not None
        parts.append(f"{p.name}: {'integer' if integer else known}")
    return tuple(parts)


def inspect(name: str, warps: int, cubin: bytes, shared: int) -> Binary:
    """Read one kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Binary(
        kernel=name,
        warps=warps,
        registers=found["REG"],
        spilled=found["STACK"] + found["LOCAL"],
        shared=shared,
        wide_loads=len(re.findall(r"\b(?:LDG\.E|LDGSTS\.E)[.\w]*\.128|\bUTMALDG\b", code)),
        tensor_cores=next((i for i in ("HGMMA", "HMMA") if i in code), "none"),
        order=memory_order(code),
    )


def memory_order(code: str) -> str:
    """Loads and stores of memory, PREEXIT and ACQBULK (launch.py's `go` and `wait`) as they stand in the machine code.

    LDG loads into registers, LDGSTS and UTMALDG into shared memory, UBLKPF into the second-level cache, STG stores;
    .128 marks what moves 16 bytes at once, *8 a run of eight.
    """
    found = re.findall(r"\b(PREEXIT|ACQBULK|(?:LDG|LDGSTS|UTMALDG|UBLKPF|STG)\b(?=\.))(?:[.\w]*(\.128)\b)?", code)
    runs = [(name, len(list(run))) for name, run in groupby(opcode + width for opcode, width in found)]
    return " ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout
