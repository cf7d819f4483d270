"""Universal checkpoints: one folder for each parameter, with its whole float32 value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.checkpoints.deepspeed.flat import cut, share
from hasten.checkpoints.deepspeed.states import States
from hasten.checkpoints.joining import Share, Whole, first, tensor_share
from hasten.checkpoints.pickles import load
from hasten.errors import WeightError


def read_universal(
    parts: Mapping[str, Path], states: Mapping[tuple[int, int], States], problems: list[str]
) -> dict[str, Whole]:
    """Every parameter's value, and from the first rank's model states what has none: buffers, frozen and tied ones."""
    one = next(iter(states.values()), None)
    shapes = {n: s for g in (one.shapes if one else ()) for n, s in g.items()}
    found: dict[str, Share] = {}
    for name, path in parts.items():
        try:
            found[name] = _part(path, shapes.get(name))
        except WeightError as e:
            problems.append(str(e))
    problems += [
        f"{next(iter(parts.values())).parent.parent}: there is no {n}/fp32.pt" for n in shapes if n not in parts
    ]
    for name, source in (one.shared if one else {}).items():
        if source in found:
            found[name] = found[source]  # a folder of its own may hold what the 16-bit weights were
    module = (one.module if one else None) or {}
    tied = {t.data_ptr(): n for n, t in module.items() if n in found and t.numel()}
    for name, t in module.items():
        if name not in found and t.numel():
            source = tied.get(t.data_ptr())
            found[name] = found[source] if source else tensor_share(t, str(one.path) if one else "")
    return {n: first([s]) for n, s in found.items()}


def _part(path: Path, shape: tuple[int, ...] | None) -> Share:
    content: Any = load(path)
    t = content.get("param") if isinstance(content, Mapping) else content
    if not isinstance(t, Tensor) or t.is_meta:
        raise WeightError(f"{path} holds no tensor under `param`")
    t = t.detach()
    if shape is None or t.dim() != 1 or t.numel() < math.prod(shape):
        return tensor_share(t, str(path))
    return share(cut([t], 0, math.prod(shape)), shape, str(path))  # ZeRO 3 leaves it flat
