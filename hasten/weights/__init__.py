"""Canonical parameters of a tower, where sources keep them, how ranks divide them. Tensors, no modules, no files."""

from hasten.weights.dialect import Dialect, Packed, Stored
from hasten.weights.fetch import Binding, fetch, resolve, stored
from hasten.weights.packing import BLOCKED, GROUPED, SEQUENTIAL, STRIDED, Packing
from hasten.weights.plan import Param, params
from hasten.weights.portion import Portion, portion, views
from hasten.weights.shard import Split, check, is_split, join, local, shard, share, sizes
from hasten.weights.stages import Cuts, counted, cut, holders, part, renamed

__all__ = [
    "BLOCKED",
    "GROUPED",
    "SEQUENTIAL",
    "STRIDED",
    "Binding",
    "Cuts",
    "Dialect",
    "Packed",
    "Packing",
    "Param",
    "Portion",
    "Split",
    "Stored",
    "check",
    "counted",
    "cut",
    "fetch",
    "holders",
    "is_split",
    "join",
    "local",
    "params",
    "part",
    "portion",
    "renamed",
    "resolve",
    "shard",
    "share",
    "sizes",
    "stored",
    "views",
]
