"""Experts that see only the tokens which chose them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.ops.act import act, gated
from hasten.ops.linear import Matrix
from hasten.ops.moe import experts
from hasten.spec import Moe


@experts.register("grouped", devices="cpu")
def _(x: Tensor, shares: Tensor, which: Tensor, up: Matrix, down: Matrix, m: Moe) -> Tensor:
    order = which.flatten().argsort(stable=True)  # the choices of expert 0, then those of expert 1, ...
    tokens, shares = order // which.shape[1], shares.flatten()[order].to(x.dtype).unsqueeze(-1)
    inner, outer, total, start = up.decode(), down.decode(), torch.zeros_like(x), 0
    for e, count in enumerate(which.flatten().bincount(minlength=m.here)[: m.here].tolist()):
        if not count:
            continue
        rows = slice(start, start := start + count)
        y = F.linear(x[tokens[rows]], inner[e], None if up.bias is None else up.bias[e])
        y = (gated if m.expert.gated else act)(y, m.expert.act)
        y = F.linear(y, outer[e], None if down.bias is None else down.bias[e])
        total.index_add_(0, tokens[rows], y * shares[rows])
    return total
