"""Sums over ranks through a mailbox (parallel/symmetric.py), and what follows a sublayer where that needs no norm.

Program n moves region n of the message: it stores its numbers into every other rank's slot, raises a flag there, waits
for the others' flags here and adds up, in the order of ranks, so that all ranks get the same bits. A rank cannot be two
messages ahead, since each waits for the other's last one; two sets of slots are therefore enough, and nothing has to be
cleared. The count of messages lies on the device, so that a recorded graph goes on counting.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.norm import NormLayer
from hasten.ops.settle import settle, settle_over
from hasten.ops.triton.arrange import cdiv, on, power_of_2, served
from hasten.ops.triton.launch import dependent, go, wait
from hasten.parallel import Group
from hasten.parallel.symmetric import LIMIT, REGION, Mailbox, Symmetric


@triton.jit(do_not_specialize=("rank",))
def push_sum(
    y,
    residual,
    layer_scale,
    out,
    addresses,
    epochs,
    count,
    rank,
    scale,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOT: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """SLOTS: where slots begin, in bytes; SLOT: the numbers that one holds; BLOCK: those of a region."""
    go(PDL)
    region = tl.program_id(0)
    i = region * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    DTYPE: tl.constexpr = y.dtype.element_ty
    r = tl.arange(0, RANKS)
    others = (r < SIZE) & (r != rank)
    theirs = tl.load(addresses + r, mask=others, other=0).to(tl.pointer_type(tl.int32)) + region * SIZE + rank
    own = tl.load(addresses + rank)
    wait(PDL)
    epoch = tl.load(epochs + region) + 1
    x = tl.load(y + i, mask=inside, other=0.0)
    first = (epoch & 1) * SIZE * SLOT + i  # in the slots of this message; a count below zero is odd or even too
    for k in tl.static_range(1, SIZE):
        there = (tl.load(addresses + (rank + k) % SIZE) + SLOTS).to(tl.pointer_type(DTYPE))
        tl.store(tl.multiple_of(there, 16) + rank * SLOT + first, x, mask=inside)
    if residual is not None:
        z = tl.load(residual + i, mask=inside, other=0.0)
    tl.debug_barrier()  # all threads have stored what the flag announces
    tl.atomic_xchg(theirs, tl.zeros((RANKS,), tl.int32) + epoch, mask=others, sem="release", scope="sys")
    raised = own.to(tl.pointer_type(tl.int32)) + region * SIZE + r
    missing = 1
    while missing > 0:
        seen = tl.atomic_add(raised, tl.zeros((RANKS,), tl.int32), mask=others, sem="acquire", scope="sys")
        missing = tl.sum((others & (seen - epoch < 0)).to(tl.int32), 0)
    tl.debug_barrier()  # all threads see what the flags announced

    slot = tl.multiple_of((own + SLOTS).to(tl.pointer_type(DTYPE)), 16) + first
    sum = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SIZE):
        said = tl.load(slot + s * SLOT, mask=inside & (rank != s), other=0.0, cache_modifier=".cg")
        sum += tl.where(rank == s, x, said).to(tl.float32)
    if layer_scale is not None:
        sum *= tl.load(layer_scale + i % WIDTH, mask=inside, other=0.0).to(tl.float32)
    sum *= scale
    if residual is not None:
        sum += z.to(tl.float32)
    tl.store(out + i, sum.to(DTYPE), mask=inside)
    tl.store(epochs + region, epoch)


def pushed(y: Tensor, residual: Tensor | None, layer_scale: Tensor | None, scale: float, box: Mailbox) -> Tensor:
    """[residual +] scale * [layer_scale *] the sum over ranks of y (..., width), all contiguous."""
    out, block = y.new_empty(y.shape), REGION // y.element_size()
    if not y.numel():
        return out
    with on(y):
        push_sum[(cdiv(y.numel(), block),)](
            y,
            residual,
            layer_scale,
            out,
            box.addresses,
            box.epochs,
            y.numel(),
            box.rank,
            scale,
            WIDTH=y.shape[-1],
            SIZE=box.size,
            RANKS=power_of_2(box.size),
            BLOCK=block,
            SLOT=LIMIT // y.element_size(),
            SLOTS=box.slots,
            num_warps=8,
            **dependent(y.device),
        )
    return out


def _accepts(
    y: Tensor,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
    group: Group,
) -> bool:
    """Shapes, dtypes and the group alone decide, so that all ranks decide alike."""
    if not isinstance(group, Symmetric) or y.numel() * y.element_size() > LIMIT:
        return False
    alike = residual.shape == y.shape and all(t is None or t.dtype == y.dtype for t in (residual, layer_scale))
    return alike and served(y, residual, layer_scale)


@settle_over.register("triton", devices="cuda", accepts=_accepts)
def _(
    y: Tensor,
    residual: Tensor,
    inner: NormLayer | None,
    outer: NormLayer | None,
    scale: float,
    layer_scale: Tensor | None,
    group: Group,
) -> Tensor:
    assert isinstance(group, Symmetric), "_accepts has seen to it"
    if inner is None and outer is None:
        own = None if layer_scale is None else layer_scale.contiguous()
        return pushed(y.contiguous(), residual.contiguous(), own, scale, group.mailbox)
    y = pushed(y.contiguous(), None, None, 1.0, group.mailbox)
    return settle(y, residual, inner, outer, scale, layer_scale)
