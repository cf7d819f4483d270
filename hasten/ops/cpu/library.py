"""The compiled kernels of kernels.cpp, loaded once, or why they are not in use."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hasten.ops.cpu.build import LIBRARY, SOURCES, stamp

LEVELS = ("portable", "avx2", "avx512")
"""Instruction sets by the numbers that the library knows them by. HASTEN_CPU forces one of them, or `off`."""
POINTER, SIZE, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

ARGUMENTS = {
    "product": (
        *(INT, INT, INT, SIZE, SIZE, SIZE),  # level, threads, number, tokens, rows, columns
        *(POINTER, SIZE, POINTER, SIZE, POINTER, POINTER),  # x and its stride, w and its stride, bias, y
        *(INT, POINTER, POINTER, FLOAT, FLOAT),  # norm, its weight and bias, eps, offset
        *(INT, INT, POINTER, SIZE, FLOAT),  # act, gated, residual and its stride, scale
    ),
    "attend": (
        *(INT, INT, INT, SIZE, SIZE, SIZE, SIZE, SIZE),  # level, threads, number, tokens, sequences, heads, kv, dim
        *(POINTER, SIZE, SIZE, POINTER, POINTER, SIZE),  # q and its strides, keys, values, page size
        *(POINTER, SIZE, POINTER, POINTER),  # tables and their stride, starts, lengths
        *(FLOAT, FLOAT, SIZE, POINTER, POINTER, POINTER),  # scale, softcap, window, slopes, sinks, y
    ),
    "write": (SIZE, SIZE, POINTER, SIZE, POINTER, SIZE, POINTER, POINTER, POINTER),  # as in kernels.cpp
    "stack": (
        *(INT, INT, INT, SIZE, POINTER, POINTER),  # level, threads, number, layers, their array, their places
        *(SIZE, POINTER, POINTER, SIZE),  # tokens, x, slots, page size
        *(SIZE, POINTER, SIZE, POINTER, POINTER),  # sequences, tables and their stride, starts, lengths
    ),
    "likeliest": (INT, INT, SIZE, SIZE, POINTER, SIZE, POINTER),  # level, number, rows, columns, x and its stride, ids
}


class Linear(ctypes.Structure):
    """A matrix and its bias: `Matrix` in calls.h."""

    _fields_ = (("w", POINTER), ("bias", POINTER), ("rows", SIZE), ("columns", SIZE), ("stride", SIZE))


class Norm(ctypes.Structure):
    """kind 0: there is none."""

    _fields_ = (("weight", POINTER), ("bias", POINTER), ("kind", SIZE), ("eps", FLOAT), ("offset", FLOAT))


class Layer(ctypes.Structure):
    """A block with its weights, as in calls.h."""

    _fields_ = (
        *((name, Linear) for name in ("qkv", "out", "up", "down")),
        *((name, Norm) for name in ("before_attention", "behind_attention", "before_mlp", "behind_mlp")),
        ("sinks", POINTER),
        *((name, SIZE) for name in ("heads", "kv_heads", "dim", "window", "turned", "neighbours")),
        *((name, SIZE) for name in ("act", "gated", "parallel")),
        *((name, FLOAT) for name in ("scale", "softcap", "residual")),
    )


PLACE = ("keys", "values", "cos", "sin", "slopes")
"""The addresses that a layer gets in one call, `Place` in calls.h."""


@dataclass(frozen=True, slots=True)
class Library:
    """level: index into LEVELS."""

    product: Any
    attend: Any
    write: Any
    stack: Any
    likeliest: Any
    level: int


@cache
def load(path: Path = LIBRARY) -> Library | str:
    """The library, or why there is none."""
    asked = os.environ.get("HASTEN_CPU", "").lower()
    if asked == "off":
        return "HASTEN_CPU=off"
    if asked and asked not in LEVELS:
        return f"HASTEN_CPU={asked}: there are {', '.join(LEVELS)} and off"
    if not path.is_file():
        return "not compiled: `python -m hasten.ops.cpu` does it where a C++ compiler is"
    try:
        found = ctypes.CDLL(str(path))
        found.hasten_stamp.restype = ctypes.c_char_p
        built_from = found.hasten_stamp().decode()
    except (OSError, AttributeError) as e:
        return f"{path.name} cannot be loaded: {e}"
    if all(source.is_file() for source in SOURCES) and built_from != stamp():
        return "compiled from other sources: `python -m hasten.ops.cpu` compiles these"
    best = found.hasten_level()
    level = LEVELS.index(asked) if asked else best
    if level > best:
        return f"HASTEN_CPU={asked}: this processor has {LEVELS[best]} at most"
    if level == 0 and not asked:
        return "this processor has neither AVX2 nor AVX512: torch's kernels serve"
    functions = {name: _typed(found, name) for name in ARGUMENTS}
    return Library(**functions, level=level)


def _typed(found: ctypes.CDLL, name: str) -> Any:
    function = found[f"hasten_{name}"]
    function.argtypes = ARGUMENTS[name]
    return function
