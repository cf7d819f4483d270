"""From logits to token ids: penalties, temperature, filters and one draw per row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.ops.table import op

ENOUGH = (1024, 8192)
"""Likeliest tokens that nearly always hold top_p's mass; finding them takes a fraction of sorting all."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How each row chooses, one number a row, (rows,). None: no row uses it.

    temperature: 0 takes the likeliest. top_k: int, 0 is off. top_p and repetition: 1 is off. The others: 0 is off.
    """

    temperature: Tensor | None = None
    min_p: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    repetition: Tensor | None = None
    presence: Tensor | None = None
    frequency: Tensor | None = None

    @property
    def penalizes(self) -> bool:
        return not (self.repetition is None and self.presence is None and self.frequency is None)

    @property
    def filters(self) -> bool:
        return not (self.min_p is None and self.top_k is None and self.top_p is None)


@op
def sample(
    logits: Tensor, c: Choice, uniform: Tensor | None, prompts: Tensor | None, generated: Tensor | None
) -> Tensor:
    """The id each row chooses, int64 (rows,), whatever the other rows are; -1 where the greatest logit is not finite.

    logits (rows, vocabulary), -inf where forbidden. uniform: float64 (rows,), from [0, 1), needed with a temperature:
    the draw is the first id whose cumulative share, in order of ids, exceeds it. prompts and generated: int64 (rows,
    any length), the tokens that penalties count, filled up with -1; needed with a penalty.

    In this order, in float32 or wider: repetition divides a positive and multiplies a negative logit of every token in
    prompts or generated (arXiv 1909.05858); frequency is subtracted once for each time a token was generated, presence
    once if it was; division by temperature; min_p keeps shares of at least min_p times the greatest; top_k keeps what
    is not below the k-th largest; top_p keeps the likeliest until their shares, of what was left, reach it. The
    likeliest always stays, and of equals at a border all do.
    """
    x = penalized(logits.to(torch.promote_types(logits.dtype, torch.float32)), c, prompts, generated)
    top, best = x.max(-1)
    if c.temperature is not None:
        assert uniform is not None, "a draw needs a random number"
        warm = c.temperature > 0
        x = x / torch.where(warm, c.temperature, 1.0).unsqueeze(-1)
        best = torch.where(warm, _draw(_filtered(x, c), uniform), best)
    return torch.where(top.isfinite(), best, -1)


def penalized(x: Tensor, c: Choice, prompts: Tensor | None, generated: Tensor | None) -> Tensor:
    """x (rows, vocabulary) after repetition, frequency and presence."""
    if not c.penalizes:
        return x
    assert prompts is not None and generated is not None, "penalties need the tokens so far"
    counts = _counts(generated, x)
    if c.repetition is not None:
        factor = c.repetition.unsqueeze(-1)
        x = torch.where((counts > 0) | (_counts(prompts, x) > 0), torch.where(x < 0, x * factor, x / factor), x)
    if c.frequency is not None:
        x = x - counts * c.frequency.unsqueeze(-1)
    if c.presence is not None:
        x = x - (counts > 0) * c.presence.unsqueeze(-1)
    return x


def _counts(tokens: Tensor, x: Tensor) -> Tensor:
    """How often each id occurs in each row, in x's shape."""
    room = x.new_zeros(len(x), x.shape[1] + 1)  # column 0 takes the filling
    return room.scatter_add_(1, tokens + 1, torch.ones_like(tokens, dtype=x.dtype))[:, 1:]


def _filtered(x: Tensor, c: Choice) -> Tensor:
    """x with -inf for what the filters drop."""
    if c.min_p is not None:
        gap = c.min_p.log().unsqueeze(-1)  # shares are compared as differences of logits
        x = torch.where(x < x.amax(-1, keepdim=True) + gap, -math.inf, x)
    if c.top_k is not None:
        k = c.top_k.clamp(max=x.shape[1])
        largest = x.topk(max(int(k.max()), 1), -1).values
        border = largest.gather(1, (k - 1).clamp(min=0).unsqueeze(-1))
        x = torch.where(x < torch.where(k > 0, border.squeeze(-1), -math.inf).unsqueeze(-1), -math.inf, x)
    if c.top_p is not None:
        share = x.double().softmax(-1)
        top_p = torch.where(c.top_p < 1, c.top_p, math.inf).unsqueeze(-1)  # off is off, whatever rounding does
        x = torch.where(share < _nucleus(share, top_p), -math.inf, x)
    return x


def _nucleus(share: Tensor, top_p: Tensor) -> Tensor:
    """The least share among the likeliest that together reach top_p, (rows, 1)."""
    for k in (*(n for n in ENOUGH if n < share.shape[1]), share.shape[1]):
        some = k < share.shape[1]
        largest = share.topk(k, -1).values if some else share.sort(-1, descending=True).values
        inside = largest.cumsum(-1) - largest < top_p
        if not bool(inside[:, -1].any()):
            break
    return torch.where(inside, largest, math.inf).amin(-1, keepdim=True)


def _draw(x: Tensor, uniform: Tensor) -> Tensor:
    mass = x.double().softmax(-1).cumsum(-1)
    at = uniform.clamp(max=1 - 2**-52).unsqueeze(-1) * mass[:, -1:]  # below the last of mass, however it rounds
    return torch.searchsorted(mass, at, right=True).squeeze(-1)
