"""How tensor-parallel ranks cut each tensor, by the patterns that a training run stored (universal_checkpoint_info)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.checkpoints.joining import Run, Share, Whole, along, first, unequal

ALIKE = "tp_replicated_parameter_patterns"
AVERAGED = "parameter_to_average_patterns"
COLUMNS = "parameter_with_row_parallelism_patterns"
PAIRS = "parameter_with_2_sub_params_cat_dim_0"
VOCABULARY = "vocabulary_parameter_patterns"
UNEVEN = "parameter_with_sub_params"


def join(name: str, shares: Sequence[Share], patterns: Mapping[str, Any]) -> Whole:
    """The whole tensor of all ranks' shares. ValueError where they cannot be joined so."""
    if len(shares) == 1:
        return first(shares)
    if _matches(patterns, UNEVEN, name):
        raise ValueError(f"it is listed in {UNEVEN}, which is not read")
    alike = _matches(patterns, ALIKE, name) or _matches(patterns, AVERAGED, name)
    axis = None if alike else 1 if _matches(patterns, COLUMNS, name) else 0
    if different := unequal(shares, axis):
        raise ValueError(f"the ranks' shares do not go together: {different}")
    if axis is None or not shares[0].entry.shape:
        return first(shares)
    whole = along(axis, shares, (1, 1) if _matches(patterns, PAIRS, name) else (1,))
    rows = patterns.get("original_vocab_size")
    return _cut(whole, rows) if rows and _matches(patterns, VOCABULARY, name) else whole


def _matches(patterns: Mapping[str, Any], kind: str, name: str) -> bool:
    listed = [p.get("patterns", ()) if isinstance(p, Mapping) else (p,) for p in patterns.get(kind) or ()]
    return any(re.match(p, name) for several in listed for p in several)


def _cut(whole: Whole, rows: int) -> Whole:
    """Its first rows: padding of the vocabulary lies behind them."""
    runs: list[Run] = []
    for run in whole.runs:
        kept = min(run.rows, rows)
        rows -= kept
        runs += [Run(run.share, run.start, run.start + kept)] if kept else []
    return Whole(whole.axis, tuple(runs))
