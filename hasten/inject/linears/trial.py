"""Whether a divided model answers as the whole one did: compared on all ranks before anybody relies on it.

As in a rehearsal every seam is compared with what left it before, and lets that pass; so what the order of additions
costs does not add up, and where it would choose another expert or token, it does not. In float32 the ranks then answer
once more by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hasten.inject.linears.divided import Meeting
from hasten.inject.linears.plan import Plan
from hasten.inject.linears.probes import Probe
from hasten.inject.linears.rehearsal import ON_RANKS, Seen, apart, see


class Trial:
    """What a whole model gives, and then whether the divided one gives the same."""

    def __init__(self, model: nn.Module, plan: Plan, probes: Sequence[Probe]) -> None:
        self.model = model
        self.seen = [see(model, probe, [s.path for s in plan.seams]) for probe in probes]

    def failure(self, meetings: Mapping[str, Meeting]) -> str | None:
        """Where the divided model first differs; None where it does not. All ranks call this."""
        try:
            found = [wrong for seen in self.seen for wrong in self._forced(meetings, seen)]
            if next(self.model.parameters()).dtype == torch.float32:
                found += [wrong for seen in self.seen if not seen.probe.new for wrong in self._outputs(seen)]
            return next(iter(found), None)
        except Exception as error:
            return f"it stops with {type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def _forced(self, meetings: Mapping[str, Meeting], seen: Seen) -> list[str]:
        found: list[str] = []
        for path, m in meetings.items():
            m.look = _looking(path, iter(seen.calls[path]), found)
        try:
            return found + self._outputs(seen)
        finally:
            for m in meetings.values():
                m.look = None

    def _outputs(self, seen: Seen) -> list[str]:
        outputs = enumerate(zip(seen.probe.run(self.model), seen.outputs, strict=True))
        what = "generate()'s tensor" if seen.probe.new else "output"
        wrong = [(k, apart(got, want, ON_RANKS)) for k, (got, want) in outputs]
        return [f"{what} {k}: {w}" for k, w in wrong if w is not None]


def _looking(path: str, calls: Iterator[tuple[Tensor, Tensor]], found: list[str]) -> Callable[[Tensor], Tensor]:
    def look(got: Tensor) -> Tensor:
        _, want = next(calls, (None, None))
        wrong = "it is called more often than before" if want is None else apart(got, want, ON_RANKS)
        if wrong is not None:
            found.append(f"{path}: {wrong}")
        return got if want is None or want.shape != got.shape else want.to(got.device)

    return look
