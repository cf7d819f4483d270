"""From token ids or a spectrogram to the first hidden state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten import ops
from hasten.ops import Matrix, NormLayer
from hasten.spec import Frames, Tokens

Weights = Mapping[str, Tensor]


def embed_tokens(e: Tokens, w: Weights, x: Tensor, positions: Tensor, types: Tensor | None, scaled: bool) -> Tensor:
    """ids (...), or vectors (..., e.width) which are `scaled` already or not, to (..., width)."""
    if not x.is_floating_point():
        x, scaled = F.embedding(x, w["tokens"]), False
    if e.scale != 1.0 and not scaled:
        x = x * (torch.tensor(e.scale, dtype=x.dtype, device=x.device) if e.scale_rounded else e.scale)
    if e.projection and e.projection.after == "tokens":
        x = ops.linear(x, _project(w))
    if e.types:
        table = w["types"]
        x = x + (table[0] if types is None else F.embedding(types, table))
    if e.positions:
        x = x + F.embedding(positions + e.position_offset, w["positions"]).to(x.dtype)
    x = _normed(x, e, w)
    if e.projection and e.projection.after == "norm":
        x = ops.linear(x, _project(w))
    return x


def embed_frames(e: Frames, w: Weights, features: Tensor) -> Tensor:
    """(batch, mels, frames) to (batch, frames / 2, width)."""
    x = F.gelu(F.conv1d(features.to(w["conv1.weight"].dtype), w["conv1.weight"], w["conv1.bias"], padding=1))
    x = F.gelu(F.conv1d(x, w["conv2.weight"], w["conv2.bias"], padding=1, stride=2)).mT
    return _normed(x + w["positions"].to(x.dtype), e, w)


def _normed(x: Tensor, e: Tokens | Frames, w: Weights) -> Tensor:
    if e.norm is None:
        return x
    return ops.norm(x, NormLayer(e.norm, w["embed_norm.weight"], w.get("embed_norm.bias")))


def _project(w: Weights) -> Matrix:
    return Matrix(w["project_in.weight"], w.get("project_in.bias"))
