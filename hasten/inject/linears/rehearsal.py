"""Whether a share of a model computes its share: tried on the whole model, in one process, before anything is divided.

The whole model runs once, and what passes the plan's seams is kept. Then it runs with the parts of the parameters that
one rank would hold: what comes to a seam has to be that rank's part of what came before, and what leaves it is what
left it before. So every stretch between two seams is tried by itself, errors do not add up, and the first stretch that
is wrong is known by its name. What a seam sums is compared when all ranks have been tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.inject.linears.plan import Plan, Seam
from hasten.inject.linears.probes import Probe, instead, main

LEAST = 1e-4  # what the order of additions may cost in any dtype
PRODUCTS = {"highest": torch.finfo(torch.float32).eps, "high": 2.0**-10, "medium": 2.0**-7}
"""A rounding in float32 products, as torch.set_float32_matmul_precision has them."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a whole model gives for a probe, and what went into and came out of its seams, call by call.

    ran: the paths of all modules that were called.
    """

    probe: Probe
    outputs: list[Tensor]
    calls: Mapping[str, list[tuple[Tensor, Tensor]]]
    ran: frozenset[str]


class Mismatch(Exception):
    """Where a share first differs, how, and how many calls of seams were right before."""

    def __init__(self, path: str, what: str, passed: int) -> None:
        super().__init__(f"{path or 'the model'}: {what}")
        self.path, self.what, self.passed = path, what, passed


def see(model: nn.Module, probe: Probe, paths: list[str]) -> Seen:
    """Run the whole model."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}
    modules, ran = dict(model.named_modules()), set[str]()

    def keep(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        taken, given = _first(args, kwargs), main(output)
        if taken is not None and isinstance(given, Tensor):
            calls[path].append((taken.detach().clone(), given.detach().clone()))

    hooks = [
        modules[path].register_forward_hook(lambda m, a, k, y, path=path: keep(path, a, k, y), with_kwargs=True)
        for path in paths
    ]

    def note(path: str) -> Any:
        return lambda *_: ran.add(path)

    hooks += [m.register_forward_pre_hook(note(path)) for path, m in modules.items()]
    try:
        outputs = probe.run(model)
    finally:
        for h in hooks:
            h.remove()
    return Seen(probe, [t.clone() for t in outputs], calls, frozenset(ran))


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What the order of additions may cost between two seams, in roundings of a dtype.

    mean: the root of the mean square of what differs, in units of that of the whole; most: its largest, of the largest.
    """

    mean: float
    most: float

    def of(self, t: Tensor) -> tuple[float, float]:
        if not t.is_floating_point():
            return 0.0, 0.0
        eps = PRODUCTS[torch.get_float32_matmul_precision()] if t.dtype == torch.float32 else torch.finfo(t.dtype).eps
        return max(LEAST, self.mean * eps), max(LEAST, self.most * eps)


REHEARSED = Tolerance(mean=0.5, most=4.0)  # the same kernels, of other widths
ON_RANKS = Tolerance(mean=2.0, most=16.0)  # a sum of rounded parts, maybe on another device


def apart(got: Tensor, want: Tensor, tolerance: Tolerance) -> str | None:
    """In what a tensor differs from what it should be by more than roundings; None where it does not."""
    if got.shape != want.shape:
        return f"it has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    units = ("in the mean", "of its largest value")
    for lost, allowed, unit in zip(differences(got, want), tolerance.of(want), units, strict=True):
        if not lost <= allowed:
            return f"it differs by {lost:.2g} {unit}, where {allowed:.2g} is allowed"
    return None


def differences(got: Tensor, want: Tensor) -> tuple[float, float]:
    """How far apart two tensors are, in the mean and at most, in units of the second's finite values."""
    got, want = got.to(want.device).double(), want.double()
    off = torch.where(got == want, 0.0, (got - want).abs()).nan_to_num(nan=torch.inf)
    finite = torch.where(want.isfinite(), want, 0.0)
    if not off.any():
        return 0.0, 0.0
    return float((off.square().mean() / finite.square().mean()).sqrt()), float(off.max() / finite.abs().max())


@contextmanager
def standing_in(model: nn.Module, plan: Plan, rank: int) -> Iterator[None]:
    """Inside, parameters and counts are those of one rank."""
    parameters, modules = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_modules())
    wholes = {c.name: parameters[c.name].data for c in plan.cuts}
    try:
        for c in plan.cuts:
            parameters[c.name].data = c.own(wholes[c.name], rank, plan.size)
        for n in plan.counts:
            for path in n.paths:
                setattr(modules[path], n.name, n.own)
        yield
    finally:
        for name, whole in wholes.items():
            parameters[name].data = whole
        for n in plan.counts:
            for path in n.paths:
                setattr(modules[path], n.name, n.whole)


class Rehearsal:
    """One model, one plan; `of` tries a rank, and `sums` what all of them give together."""

    def __init__(self, model: nn.Module, plan: Plan, seen: list[Seen]) -> None:
        self.model, self.plan, self.seen = model, plan, seen
        self.modules = dict(model.named_modules())
        self.summed: list[dict[str, list[Tensor]]] = [{} for _ in seen]
        self.passed, self.at = 0, ""

    def of(self, rank: int) -> None:
        """Raises Mismatch."""
        self.passed = 0
        for seen, summed in zip(self.seen, self.summed, strict=True):
            with standing_in(self.model, self.plan, rank), self._listening(rank, seen, summed):
                try:
                    outputs = seen.probe.run(self.model)
                except Mismatch:
                    raise
                except Exception as error:
                    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    raise Mismatch(self.at, f"behind it the model stops with {said}", self.passed) from error
            wrong = [apart(got, want, REHEARSED) for got, want in zip(outputs, seen.outputs, strict=False)]
            wrong = [f"of its output, {w}" for w in wrong if w is not None]
            if wrong or len(outputs) != len(seen.outputs):
                raise Mismatch("", next(iter(wrong), "it returns another number of tensors"), self.passed)

    def sums(self) -> None:
        """Raises Mismatch where the ranks' summands do not give the whole."""
        for seen, summed in zip(self.seen, self.summed, strict=True):
            for path in (s.path for s in self.plan.seams if s.kind == "sum"):
                for total, (_, want) in zip(summed[path], seen.calls[path], strict=True):
                    if wrong := apart(total.to(want.dtype), want, REHEARSED):
                        raise Mismatch(path, f"of the sum behind it, {wrong}", self.passed)

    @contextmanager
    def _listening(self, rank: int, seen: Seen, summed: dict[str, list[Tensor]]) -> Iterator[None]:
        hooks = [m.register_forward_pre_hook(self._entered(path)) for path, m in self.modules.items()]
        for seam in self.plan.seams:
            stretch = _Stretch(self, seam, rank, iter(seen.calls[seam.path]), summed.setdefault(seam.path, []))
            self.modules[seam.path].forward = stretch.forward
        try:
            yield
        finally:
            for h in hooks:
                h.remove()
            for seam in self.plan.seams:
                del self.modules[seam.path].__dict__["forward"]

    def _entered(self, path: str) -> Any:
        def note(*_: Any) -> None:
            self.at = path

        return note


class _Stretch:
    """Stands in for a seam's forward: looks at what comes, and lets pass what came before."""

    def __init__(
        self, rehearsal: Rehearsal, seam: Seam, rank: int, calls: Iterator[tuple[Tensor, Tensor]], totals: list[Tensor]
    ) -> None:
        self.rehearsal, self.seam, self.rank, self.calls, self.totals = rehearsal, seam, rank, calls, totals
        self.theirs = rehearsal.modules[seam.path].forward
        self.count = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        entered, left = next(self.calls, (None, None))
        if entered is None or left is None:
            raise self._wrong("it is called more often than by the whole model, or gives no tensor")
        own = self._own
        match self.seam.kind:
            case "rows":
                self._check("its input", _first(args, kwargs), own(entered))
            case "rows of whole":
                self._check("its input", _first(args, kwargs), entered)
            case "gather":
                self._check("its output", self.theirs(*args, **kwargs), own(left))
            case "sum":
                self._check("its input", _first(args, kwargs), entered)
                given = self.theirs(*args, **kwargs)
                self._add(main(given))
                self.rehearsal.passed += 1
                return instead(given, left.clone())
        self.rehearsal.passed += 1
        return left.clone()

    def _own(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.rehearsal.plan.size, -1)[self.rank]

    def _check(self, what: str, got: Any, want: Tensor) -> None:
        wrong = apart(got, want, REHEARSED) if isinstance(got, Tensor) else "it is no tensor"
        if wrong is not None:
            raise self._wrong(f"of {what}, {wrong}")

    def _add(self, summand: Tensor) -> None:
        if self.count == len(self.totals):
            self.totals.append(torch.zeros_like(summand, dtype=torch.float64))
        self.totals[self.count] += summand
        self.count += 1

    def _wrong(self, what: str) -> Mismatch:
        return Mismatch(self.seam.path, what, self.rehearsal.passed)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
