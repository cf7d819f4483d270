"""Who looks on while a backbone runs once: it measures every block, and keeps the last hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten import ops
from hasten.model import Transformer
from hasten.model.block import block
from hasten.model.context import Dense
from hasten.model.layer import Layer, layer
from hasten.parallel import Chain, Group
from hasten.spec import Moe

if TYPE_CHECKING:
    from hasten.inject.backbone import Backbone

FLOORS = {
    torch.float32: 2e-6,  # 16 roundings of 2^-24, relative, where the references happen to lose nothing
    torch.float16: 1e-3,  # two roundings of 2^-11
    torch.bfloat16: 8e-3,  # two roundings of 2^-8
}
"""Relative root mean square error that is always allowed to a block, by dtype."""

ASTRAY = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
"""How far an original may be from the truth, relatively, before the description is held to be wrong."""


@dataclass(frozen=True, slots=True)
class BlockReport:
    """Relative root mean square errors of one block's change to its input, against the wide truth."""

    tower: str
    index: int
    fused: float
    reference: float
    allowed: float
    fell_back: bool


@dataclass(frozen=True, slots=True)
class OutputReport:
    """The last hidden state of one backbone against the wide truth: relative errors, fused and original."""

    tower: str
    fused: float
    original: float
    allowed: float
    gave_way: bool


class Watch:
    """Sits in a backbone during one probe: measures its blocks, and keeps its last hidden states."""

    def __init__(self, b: Backbone, factor: float, seen: Tensor | None) -> None:
        self.b, self.factor, self.seen = b, factor, seen
        self.name = b.path or type(b.module).__name__
        self.routes = any(isinstance(s.mlp, Moe) for s in b.tower.blocks)
        self.reports: list[BlockReport] = []
        self.measures = True
        self.truth: Tensor | None = None
        self.last: dict[str, Tensor] = {}

    @property
    def fallen(self) -> list[int]:
        return [r.index for r in self.reports if r.fell_back]

    def blocks(self, x: Tensor, ctx: Dense) -> None:
        """Measure every block on the truth's hidden states; ones that lose too much fall back."""
        if not self.measures:
            return
        t, wide = self.b.transformer, torch.float64 if x.dtype == torch.float32 else torch.float32
        chain = t.place.chain
        h = (
            self._measured(x.to(wide), x.dtype, ctx)
            if chain is None
            else self._in_turn(chain, x.to(wide), x.dtype, ctx)
        )
        with ops.use("reference"):
            self.truth = t.finish(h)

    def _in_turn(self, chain: Chain, h: Tensor, dtype: torch.dtype, ctx: Dense) -> Tensor:
        """`_measured` on one stage after the other; all of them have the truth then, and every report."""
        h = chain.receive(h, chain.rank - 1) if chain.rank else h
        h = self._measured(h, dtype, ctx)
        sent = chain.send(h, chain.rank + 1) if chain.rank + 1 < chain.size else None
        self.reports = [r for stage in range(chain.size) for r in chain.tell(self.reports, stage)]
        if sent is not None:
            sent.wait()
        return chain.broadcast(h, chain.size - 1).wait()

    def _measured(self, h: Tensor, dtype: torch.dtype, ctx: Dense) -> Tensor:
        """The wide hidden states behind the blocks that are here, which run in `dtype`."""
        t, wide = self.b.transformer, h.dtype
        for i in range(len(t.layers)):
            given = h.to(dtype)
            with ops.use("reference"):
                h = block(_widened(t, i, wide), i, given.to(wide), ctx)
                plain = block(t.layers[i], i, given, ctx)
            fused = t.block(i, given, ctx)
            lost, native = (self._error(y, h, h - given.to(wide)) for y in (fused, plain))
            allowed = self.factor * native + FLOORS[dtype]
            fell = self._agreed(not lost <= allowed, t.place.over)  # NaN falls back too
            if fell:
                t.backends[i] = "reference"
            self.reports.append(BlockReport(self.name, self.b.here[i], lost, native, allowed, fell))
        return h

    def output(self) -> OutputReport:
        """The whole backbone's verdict; one that lost too much leaves its calls to the model's own forward."""
        assert self.truth is not None
        fused, original = (self._error(self.last[k], self.truth, self.truth) for k in ("fused", "original"))
        dtype = self.last["fused"].dtype
        # rounding errors of blocks add up in quadrature; both runs may do so in different directions
        allowed = self.factor * original + FLOORS[dtype] * math.sqrt(len(self.b.tower.blocks))
        gave_way = self._agreed(
            not fused <= allowed or not original <= ASTRAY[dtype], self.b.transformer.place.everyone
        )
        if gave_way:
            self.b.bypass = "the certificate refused the fused backbone"
        return OutputReport(self.name, fused, original, allowed, gave_way)

    def _agreed(self, verdict: bool, over: Group | None) -> bool:
        """What the first of several ranks that compute the same has found."""
        return verdict if over is None else over.share(verdict)

    def _error(self, y: Tensor, truth: Tensor, scale: Tensor) -> float:
        """Root mean square of y - truth, relative to that of `scale`, over tokens that are no padding.

        Where experts are chosen it is the median token's: one rounding decides between two experts that score alike,
        and either choice is right for that token.
        """
        lost = y.to(truth.dtype) - truth
        if self.seen is not None and self.seen.shape == lost.shape[:2]:
            lost, scale = lost[self.seen], scale[self.seen]
        squares = lost.square().mean(-1)
        typical = squares.median() if self.routes else squares.mean()
        return float(typical.sqrt() / scale.square().mean().sqrt().clamp(min=1e-30))


def _widened(t: Transformer, i: int, dtype: torch.dtype) -> Layer:
    """Block i with weights of its own, which are to go before the next block's are made."""
    own = {k: v.to(dtype) for k, v in t.weights.items() if k.startswith(f"blocks.{i}.")}
    return layer(t.tower.blocks[i], own, i, t.place.over)
