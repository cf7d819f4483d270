"""Canonical parameters of a tower, and where sources keep them. Torch tensors, no modules, no files."""

from hasten.weights.dialect import Dialect, Packed, Stored
from hasten.weights.fetch import Binding, fetch, resolve, stored
from hasten.weights.packing import BLOCKED, GROUPED, SEQUENTIAL, STRIDED, Packing
from hasten.weights.plan import Param, params

__all__ = [
    "BLOCKED",
    "GROUPED",
    "SEQUENTIAL",
    "STRIDED",
    "Binding",
    "Dialect",
    "Packed",
    "Packing",
    "Param",
    "Stored",
    "fetch",
    "params",
    "resolve",
    "stored",
]
