"""From token ids or a spectrogram to the first hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten import ops
from hasten.ops import EmbedLayer, Matrix, NormLayer
from hasten.ops.embed import placed
from hasten.parallel import Group
from hasten.spec import Frames, Tokens

Weights = Mapping[str, Tensor]


def embed_tokens(
    e: Tokens, w: Weights, x: Tensor, positions: Tensor, types: Tensor | None, *, scaled: bool, over: Group | None
) -> Tensor:
    """ids (...), or vectors (..., e.width) which are `scaled` already or not, to (..., width).

    over: the ranks among which the table of tokens is divided.
    """
    look_up = ops.embed if over is None else partial(ops.embed_over, group=over)
    layer = EmbedLayer(e, w["tokens"], w["positions"] if e.positions else None, w["types"] if e.types else None)
    narrow = e.projection is not None and e.projection.after == "tokens"
    if x.is_floating_point():
        if e.scale != 1.0 and not scaled:
            x = x * (torch.tensor(e.scale, dtype=x.dtype, device=x.device) if e.scale_rounded else e.scale)
    elif narrow:
        x = look_up(x, None, None, EmbedLayer(e, w["tokens"]))
    else:
        return _finished(look_up(x, positions, types, layer), e, w)
    return _finished(placed(ops.linear(x, _project(w)) if narrow else x, positions, types, layer), e, w)


def _finished(x: Tensor, e: Tokens, w: Weights) -> Tensor:
    x = _normed(x, e, w)
    return ops.linear(x, _project(w)) if e.projection and e.projection.after == "norm" else x


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
