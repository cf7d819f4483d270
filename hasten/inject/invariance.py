"""Whether a model can answer a request with the same bits whatever runs beside it; if not, why, and what would help."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from hasten.errors import ConfigError
from hasten.inject.backbone import Backbone
from hasten.inject.loan import live_tensors
from hasten.ops.backends import BACKENDS
from hasten.spec import Alibi, Moe, Tokens, Tower
from hasten.weights import params

HOPPER = (9, 0)  # the compute capability on whose matrix instructions the mode rests
NARROW = (torch.float16, torch.bfloat16)
WIDEST_NORM, WIDEST_HEAD, MOST_HEADS, LARGEST_TILE = 16384, 256, 128, 128 * 256
"""What one program holds: numbers of a norm's row and of a head, heads that share keys, and both of these together."""

NO_PRODUCTS = frozenset(("positions", "types", "q_norm", "k_norm"))
"""Slots of tensors with two axes that nothing is multiplied with."""


def check_invariance(
    model: nn.Module, backbones: list[Backbone], dtype: torch.dtype | None, device: torch.device | None
) -> None:
    """Raise ConfigError unless native generation of the model, in `dtype` on `device`, can be batch-invariant."""
    tensors = live_tensors(model)
    where = device or next(iter(tensors.values())).device
    bound = {k for b in backbones for binding in b.bindings for k in binding.keys}
    dtypes = {dtype} if dtype else {t.dtype for name, t in tensors.items() if name in bound}
    towers = [b.tower for b in backbones if b.seam.kind == "decoder" and b.tower.head is not None]
    problems = [*_places(where), *_dtypes(dtypes), *_decoders(towers, len(backbones))]
    if problems:
        raise ConfigError(f"batch_invariant=True cannot be kept for {type(model).__name__}: {'; '.join(problems)}")


def check_fallbacks(backbones: list[Backbone]) -> None:
    """Raise ConfigError where the certificate made blocks fall back, to products that depend on the rows."""
    fallen = sum(len(b.transformer.backends) for b in backbones)
    if fallen:
        raise ConfigError(
            f"batch_invariant=True cannot be kept: {fallen} blocks lost more than the certificate allows and fell back "
            "to other kernels; leave one of the two options out"
        )


def unkept(t: Tower) -> list[str]:
    """What of a tower has no kernel that adds up in one order, however many rows there are."""
    return list(dict.fromkeys(_unkept(t)))


def _places(where: torch.device) -> Iterator[str]:
    if where.type != "cuda":
        yield f"it runs on {where.type}, whose products depend on the rows beside a row: use an NVIDIA GPU"
    elif not BACKENDS["triton"][0]():
        yield "Triton 3.4 or newer is not installed, whose kernels keep the order of sums: install hasten[gpu]"
    elif (found := torch.cuda.get_device_capability(where)) < HOPPER:
        yield f"this GPU's compute capability is {found[0]}.{found[1]}; 9.0 (H100) or higher is needed"


def _dtypes(dtypes: set[torch.dtype]) -> Iterator[str]:
    if len(dtypes) > 1 or not dtypes <= set(NARROW):
        found = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        yield f"its weights are {found}: pass dtype=torch.bfloat16 or torch.float16"


def _decoders(towers: list[Tower], backbones: int) -> Iterator[str]:
    if len(towers) != 1 or backbones != 1:
        yield "it is no decoder with a language model head, which alone generates natively: leave the option out"
    for t in towers:
        yield from unkept(t)


def _unkept(t: Tower) -> Iterator[str]:
    for b in t.blocks:
        if isinstance(b.mlp, Moe):
            yield "what a token's experts add up depends on the tokens beside it: models without experts are served"
        a, group = b.attention, b.attention.heads // b.attention.kv_heads
        if isinstance(a.position, Alibi) and a.position.bf16:
            yield "its alibi is rounded to bfloat16, which makes it depend on where a key lies"
        large = a.head_dim > WIDEST_HEAD or group > MOST_HEADS or _power(group) * _power(a.head_dim) > LARGEST_TILE
        if large:
            yield f"{group} heads of {a.head_dim} numbers that share keys are more than a program of attention holds"
    if t.width > WIDEST_NORM:
        yield f"its rows of {t.width} numbers are longer than those of the norms' kernel ({WIDEST_NORM})"
    looked_up = isinstance(t.embed, Tokens) and not (t.head and t.head.tied)
    for p in params(t):
        multiplied = p.kind == "weight" and len(p.columns) == 1 and p.slot not in NO_PRODUCTS
        if multiplied and not (p.slot == "tokens" and looked_up) and p.columns[0] % 8:
            yield f"products read 8 columns at a time, and {p.slot} has {p.columns[0]}"


def _power(n: int) -> int:
    """Rows or columns of the tile that n of them take."""
    return max(1 << (n - 1).bit_length(), 16)
