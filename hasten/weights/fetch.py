"""Between stored tensors and canonical ones, in both directions.

`stored(fetch(...))` gives back what was read. Where the canonical tensor's memory can be seen in the stored layout,
`stored` returns views of it, so that a live model keeps its parameters without keeping a second copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import WeightError
from hasten.spec import Tower
from hasten.weights.dialect import Dialect, key
from hasten.weights.plan import Param, params


@dataclass(frozen=True, slots=True)
class Binding:
    """A canonical parameter and the keys of the stored tensors that hold it, under one dialect."""

    param: Param
    keys: tuple[str, ...]
    dialect: Dialect


def resolve(t: Tower, dialects: Sequence[Dialect], tensors: Mapping[str, Tensor], prefix: str) -> list[Binding]:
    """A binding for every parameter of the tower, all under the first dialect that has them all, in the right shapes.

    Raises WeightError for the dialect that came closest, with everything that is missing or misshapen.
    """
    failures: list[tuple[Dialect, list[str]]] = []
    for d in dialects:
        bindings, problems = _attempt(t, d, tensors, prefix)
        if not problems:
            return bindings
        failures.append((d, problems))
    d, problems = min(failures, key=lambda f: len(f[1]))
    shown = "\n  ".join(problems[:40]) + (f"\n  ... and {len(problems) - 40} more" if len(problems) > 40 else "")
    others = ", ".join(f"{o.name}: {len(p)} problems" for o, p in failures if o is not d)
    raise WeightError(
        f"{d.name}: {len(problems)} problems{f' (other layouts: {others})' if others else ''}:\n  {shown}"
    )


def _attempt(t: Tower, d: Dialect, tensors: Mapping[str, Tensor], prefix: str) -> tuple[list[Binding], list[str]]:
    bindings: list[Binding] = []
    problems: list[str] = []
    for p in params(t):
        if not d.knows(p):
            problems.append(f"no place known for {p.name}")
            continue
        found = [(n, key(n, p.kind, tensors.__contains__)) for n in d.names(p, prefix)]
        missing = [n for n, k in found if k is None]
        problems += [f"no tensor {n}.{p.kind} for {p.name}" for n in missing]
        if missing:
            continue
        b = Binding(p, tuple(k for _, k in found if k is not None), d)
        problems += _misshapen(b, tensors)
        bindings.append(b)
    return bindings, problems


def _misshapen(b: Binding, tensors: Mapping[str, Tensor]) -> list[str]:
    expected = stored(b, torch.empty(b.param.shape, device="meta"))
    return [
        f"{k} is {tuple(tensors[k].shape)}, the config says {tuple(want.shape)}"
        for k, want in zip(b.keys, expected, strict=True)
        if [n for n in tensors[k].shape if n != 1] != [n for n in want.shape if n != 1]
    ]


@torch.no_grad()
def fetch(b: Binding, tensors: Mapping[str, Tensor]) -> Tensor:
    """The canonical tensor: the stored one itself where nothing has to be rearranged."""
    p, d = b.param, b.dialect
    found = [_upright(tensors[k], b) for k in b.keys]
    if len(found) == 1 and not any(p.absent):
        t = found[0]
        if p.stack:
            return d.packing(p).unpack(t.transpose(0, 1), p.parts, p.unit).transpose(0, 1).contiguous()
        return d.packing(p).unpack(t, p.parts, p.unit).reshape(p.shape).contiguous()
    if p.stack:
        each = len(found) // p.stack
        return torch.stack([torch.cat(found[i : i + each]) for i in range(0, len(found), each)])
    if any(p.absent) and len(found) + sum(p.absent) == len(p.parts):
        rest = iter(found)
        absent = zip(p.absent, p.parts, strict=True)
        found = [found[0].new_zeros(n, *p.columns) if gone else next(rest) for gone, n in absent]
    return torch.cat([t.reshape(n, *p.columns) for t, n in zip(found, p.parts, strict=True)])


@torch.no_grad()
def stored(b: Binding, canonical: Tensor) -> list[Tensor]:
    """The stored tensors of a canonical one, in the order of `b.keys`: views of it wherever the layout allows."""
    p, d = b.param, b.dialect
    if len(b.keys) == 1 and not any(p.absent):
        if p.stack:
            packed = d.packing(p).pack(canonical.transpose(0, 1), p.parts, p.unit).transpose(0, 1)
        else:
            packed = d.packing(p).pack(canonical, p.parts, p.unit)
        return [_upright(packed, b)]
    if p.stack:
        each = len(b.keys) // p.stack
        return [_upright(t, b) for e in canonical for t in (e.split(list(p.parts)) if each > 1 else (e,))]
    absent = p.absent or (False,) * len(p.parts)
    parts = canonical.split(list(p.parts))
    return [_upright(t, b) for t, gone in zip(parts, absent, strict=True) if not gone]


def _upright(t: Tensor, b: Binding) -> Tensor:
    turned = b.param.slot in b.dialect.transposed and b.param.kind == "weight" and t.ndim > 1
    return t.mT if turned else t
