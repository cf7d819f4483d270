"""Images: the model's own embedding makes vectors of them, with whatever flags it knows; our blocks go on from there.

So masked patches, stretched positions, registers and other sizes are the model's own code, exactly; what is left to it
costs a convolution and an addition.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hasten.errors import RequestError
from hasten.inject import captured
from hasten.inject.ahead import settle
from hasten.inject.calls.call import COMMON, Call, default, give, run_blocks
from hasten.inject.calls.pool import pool, poolers
from hasten.inject.patches import PatchesAsProducts
from hasten.model import Dense
from hasten.spec import Patches

if TYPE_CHECKING:
    from hasten.inject.backbone import Arguments, Backbone

FLAGS = ("bool_masked_pos", "interpolate_pos_encoding")


def run(b: Backbone, a: Arguments) -> Any:
    pixels, dtype, states = _pixels(a), _dtype(b), None
    if default(b, a, "output_hidden_states") or a.get("bool_masked_pos") is not None or b.watch is not None:
        settle()
        last, pooled, states = _see(b, a, pixels.to(dtype))
    else:

        def compute(pixels: Tensor) -> captured.Tensors:
            return _see(b, a, pixels.to(dtype))[:2]

        flag = bool(a.get("interpolate_pos_encoding"))
        last, pooled = captured.run(b, compute, (pixels,), ("image", flag, dtype), _own(b))
    output = BaseModelOutputWithPooling(
        last_hidden_state=last,  # pyright: ignore[reportArgumentType]
        pooler_output=pooled,  # pyright: ignore[reportArgumentType]
        hidden_states=states,
    )
    return give(output, b, a)


def _see(b: Backbone, a: Arguments, pixels: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """Last hidden state, what is pooled of it, and all hidden states if they are asked for."""
    h = _stem(b, pixels, a)
    positions = torch.arange(h.shape[1], device=h.device)[None]
    ctx = Dense(positions, biases=_biases(b, pixels, h.shape[1], bool(a.get("interpolate_pos_encoding"))))
    last, states = run_blocks(b, h, ctx, bool(default(b, a, "output_hidden_states")))
    return last, pool(b, last, pixels), states


def _own(b: Backbone) -> list[nn.Module]:
    """The model's own modules that a call runs."""
    stems = [b.module.get_submodule(name) for name in b.seam.stem]
    biased = [m for i in range(len(b.tower.blocks) if b.seam.biases else 0) for m in _biased(b, i)]
    return [*poolers(b), *stems, *biased]


def _biased(b: Backbone, i: int) -> list[nn.Module]:
    """The model's own modules that make the biases of block i."""
    return [m for n in b.seam.biases if (m := _below(b.module, n.format(i=i))) is not None]


def _below(module: nn.Module | None, path: str) -> nn.Module | None:
    for part in path.split("."):
        module = None if module is None else module._modules.get(part)
    return module


def _pixels(a: Arguments) -> Tensor:
    pixels = a.get("pixel_values")
    if pixels is None:
        raise RequestError("give pixel_values")
    if pixels.ndim != 4 or not pixels.is_floating_point():
        shape = f"{tuple(pixels.shape)} of {pixels.dtype}"
        raise RequestError(f"pixel_values must be floating point (batch, channels, height, width), got {shape}")
    return pixels


def _dtype(b: Backbone) -> torch.dtype:
    """What the model's own embedding computes in."""
    return next(p.dtype for m in captured.within(b.module) for p in m._parameters.values() if p is not None)


def _stem(b: Backbone, pixels: Tensor, a: Arguments) -> Tensor:
    """The first hidden state, (batch, tokens, width)."""
    first, *rest = (b.module.get_submodule(name) for name in b.seam.stem)
    knows = inspect.signature(first.forward).parameters
    flags = FLAGS[:1] if b.seam.biases else FLAGS  # embeddings beside biases always fit their positions to the image
    with PatchesAsProducts():
        made = first(pixels, **{n: a[n] for n in flags if n in knows and a.get(n) is not None})
    h = made[0] if isinstance(made, tuple) else made
    for module in rest:
        h = module(h)
    return h


def _biases(b: Backbone, pixels: Tensor, tokens: int, interpolate: bool) -> Callable[[int], Tensor | None] | None:
    """The bias (1, heads, tokens, tokens) of each block's scores, by the model's own modules; None without such."""
    if not b.seam.biases:
        return None
    assert isinstance(b.tower.embed, Patches)
    grid = tuple(n // p for n, p in zip(pixels.shape[2:], b.tower.embed.patch, strict=True))

    def bias(i: int) -> Tensor | None:
        each: list[Tensor] = [_bias(m, grid, tokens, interpolate) for m in _biased(b, b.here[i])]
        return b.transformer.place.own(torch.stack(each).sum(0).float(), 1) if each else None

    return bias


def _bias(module: nn.Module, grid: tuple[int, ...], tokens: int, interpolate: bool) -> Tensor:
    return module(grid, interpolate_pos_encoding=interpolate, dim_size=tokens)


IMAGE = Call(run, COMMON | {"pixel_values", *FLAGS, "use_cache"}, ahead=True)
