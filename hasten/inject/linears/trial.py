"""Whether a divided model answers as the whole one did: compared on all ranks before anybody relies on it.

The yardstick is the whole model itself, run once more with every sum made as ranks make it: of as many products, each
rounded. What that changes is what the order of additions explains; a divided model may lose FACTOR times as much, and
the roundings of its dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.inject.linears.divided import Meeting
from hasten.inject.linears.matrices import layout, summed
from hasten.inject.linears.plan import Plan
from hasten.inject.linears.probes import Probe
from hasten.inject.linears.rehearsal import Seen, apart, difference, run, see, tensors, tolerance

FACTOR = 4.0
NEW = 4  # tokens that a language model goes on by

Noise = Mapping[str, list[float]]
"""By seam, what the order of additions costs at each call; by "" of each tensor that the model returns."""


@dataclass(frozen=True, slots=True)
class Continued:
    """Greedy tokens behind a probe, (rows, tokens), and the logits that each was chosen from, (rows, vocabulary)."""

    tokens: Tensor
    logits: tuple[Tensor, ...]


class Trial:
    """What a whole model gives, and then whether the divided one gives the same."""

    def __init__(self, model: nn.Module, plan: Plan, probes: Sequence[Probe]) -> None:
        self.model = model
        paths = [s.path for s in plan.seams]
        self.seen = [see(model, probe, paths) for probe in probes]
        with _reordered(model, plan):
            again = [see(model, probe, paths) for probe in probes]
        self.noise = [_noise(one, other) for one, other in zip(self.seen, again, strict=True)]
        self.continued = [_continued(model, probe) for probe in probes]

    def failure(self, meetings: Mapping[str, Meeting]) -> str | None:
        """Where the divided model first differs; None where it does not. All ranks call this."""
        try:
            return next(iter(self._differences(meetings)), None)
        except Exception as error:
            return f"it stops with {type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def _differences(self, meetings: Mapping[str, Meeting]) -> list[str]:
        found: list[str] = []
        for seen, noise, whole in zip(self.seen, self.noise, self.continued, strict=True):
            found += self._forward(meetings, seen, noise)
            now = _continued(self.model, seen.probe)
            if whole is not None:
                wrong = "generate() fails" if now is None else _diverged(now, whole, max(noise[""], default=0.0))
                found += [] if wrong is None else [f"generate(): {wrong}"]
        return found

    def _forward(self, meetings: Mapping[str, Meeting], seen: Seen, noise: Noise) -> list[str]:
        found: list[str] = []
        for path, m in meetings.items():
            m.look = _looking(path, iter(zip(seen.calls[path], noise[path], strict=True)), found)
        try:
            outputs = tensors(run(self.model, seen.probe))
        finally:
            for m in meetings.values():
                m.look = None
        for k, (got, want) in enumerate(zip(outputs, seen.outputs, strict=True)):
            wrong = apart(got, want, noise[""][k])
            found += [] if wrong is None else [f"the model's output {k}: {wrong}"]
        return found


def _looking(path: str, calls: Iterator[Any], found: list[str]) -> Callable[[Tensor], None]:
    def look(got: Tensor) -> None:
        (_, want), noise = next(calls, ((None, None), 0.0))
        wrong = "it is called more often than before" if want is None else apart(got, want, noise)
        if wrong is not None:
            found.append(f"{path}: {wrong}")

    return look


def _noise(seen: Seen, again: Seen) -> Noise:
    calls = {
        path: [FACTOR * difference(b, a) for (_, a), (_, b) in zip(calls, again.calls[path], strict=True)]
        for path, calls in seen.calls.items()
    }
    return {**calls, "": [FACTOR * difference(b, a) for a, b in zip(seen.outputs, again.outputs, strict=True)]}


@contextmanager
def _reordered(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Inside, linears that ranks will sum behind add as many products as there are ranks."""
    modules = dict(model.named_modules())
    rows = [modules[s.path] for s in plan.seams if s.kind in ("rows", "rows of whole")]
    for m in rows:
        m.forward = _Pieces(m, plan.size).forward
    try:
        yield
    finally:
        for m in rows:
            del m.__dict__["forward"]


class _Pieces:
    def __init__(self, module: nn.Module, size: int) -> None:
        self.module, self.size = module, size

    def forward(self, x: Tensor) -> Tensor:
        found, weight = layout(self.module), self.module.get_parameter("weight")
        assert found is not None
        return summed(self.module, x.chunk(self.size, -1), weight.chunk(self.size, found.inputs), lambda y: y)


def _continued(model: Any, probe: Probe) -> Continued | None:
    """Some greedy tokens, with the model's cache; None for models that do not generate."""
    can, ids = getattr(model, "can_generate", None), probe.kwargs.get("input_ids")
    if ids is None or not callable(can) or not can():
        return None
    how = copy.deepcopy(model.generation_config)
    how.update(
        max_new_tokens=NEW, max_length=None, do_sample=False, num_beams=1, return_dict_in_generate=True,
        output_logits=True, use_cache=True, pad_token_id=0 if how.pad_token_id is None else how.pad_token_id,
    )  # fmt: skip
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return Continued(made.sequences[:, -len(made.logits) :], tuple(made.logits))


def _diverged(got: Continued, want: Continued, noise: float) -> str | None:
    """Where tokens differ that were not as good as equal, or logits do while the tokens in front are the same."""
    going = torch.ones(len(want.tokens), dtype=torch.bool)
    for k, (a, b) in enumerate(zip(got.logits, want.logits, strict=False)):
        if not bool(going.any()):
            break
        mine, theirs = a.cpu()[going], b.cpu()[going]
        if wrong := apart(mine, theirs, noise):
            return f"logits of new token {k}: {wrong}"
        unlike = got.tokens[:, k].cpu()[going] != want.tokens[:, k].cpu()[going]
        top = theirs.double().topk(2).values
        close = top[:, 0] - top[:, 1] <= 2 * (tolerance(theirs) + noise) * top.abs().max()
        if bool((unlike & ~close).any()):
            return f"greedy tokens differ at new token {k}"
        going[going.nonzero().flatten()[unlike]] = False
    return None
