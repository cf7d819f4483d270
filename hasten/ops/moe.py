"""Mixture of experts: which experts a token takes, and what they make of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.act import act, gated
from hasten.ops.linear import Matrix, linear
from hasten.ops.table import op
from hasten.spec import Moe


@op
def route(x: Tensor, router: Matrix, m: Moe) -> tuple[Tensor, Tensor]:
    """(tokens, width) to float32 shares (tokens, top_k) and int64 experts (tokens, top_k), best first."""
    logits = linear.reference(x, router)
    wide = logits.to(torch.promote_types(x.dtype, torch.float32))
    scores = wide.softmax(-1) if m.score == "softmax" else wide.sigmoid()
    top, which = scores.topk(m.top_k, -1)
    return (top / top.sum(-1, keepdim=True) if m.renormalize else top), which


@op
def experts(x: Tensor, shares: Tensor, which: Tensor, up: Matrix, down: Matrix, m: Moe) -> Tensor:
    """(tokens, width): the sum over each token's experts of share * down(act(up x)).

    up (experts, rows, width), down (experts, width, expert width), biases (experts, rows), of the `m.here` experts that
    `which` counts; a number from there on is an expert that is elsewhere, and adds nothing.
    Every expert sees every token and is weighted, mostly by zero.
    """
    weight = torch.zeros(len(x), m.here + 1, dtype=shares.dtype, device=x.device).scatter(1, which, shares)
    inner, outer, total = up.decode(), down.decode(), torch.zeros_like(x)
    for e in range(m.here):
        y = F.linear(x, inner[e], None if up.bias is None else up.bias[e])
        y = (gated if m.expert.gated else act).reference(y, m.expert.act)
        y = F.linear(y, outer[e], None if down.bias is None else down.bias[e])
        total = total + y * weight[:, e, None].to(x.dtype)
    return total


def held(which: Tensor, m: Moe) -> Tensor:
    """Experts by their numbers among those that are here, as `experts` wants them: m.here is any that is elsewhere."""
    if m.held is None:
        return which
    first, count = m.held
    return torch.where((which >= first) & (which < first + count), which - first, count)
