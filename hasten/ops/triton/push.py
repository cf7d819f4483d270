"""Sums over ranks through a mailbox (parallel/symmetric.py), and what follows a sublayer where that needs no norm.

A message is 8 bytes: 32 bits of numbers, and which call of their box it is, so that a receiver sees by the message
itself that it has come: no barrier, no flag behind a fence, one way over the link (NCCL's protocol LL has the same
idea). Program n moves piece n: it stores its words into every other rank's boxes, awaits theirs here and adds up, in
the order of ranks, so that all ranks get the same bits. A box is written to again two calls later; its owner has
answered the call between by then, for which its kernel for this one had to end, so nothing has to be cleared. Calls are
counted on the device, so that a recorded graph goes on counting.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hasten.ops.norm import NormLayer
from hasten.ops.settle import settle, settle_over
from hasten.ops.triton.arrange import cdiv, interpreted, on, served
from hasten.ops.triton.launch import dependent, go, wait
from hasten.parallel import Group
from hasten.parallel.symmetric import LIMIT, PIECE, Mailbox, Symmetric


@triton.jit
def send(box, word, call, mine, SYSTEM: tl.constexpr):
    """Word and call in one store, seen by other devices where SYSTEM."""
    message = (call.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
    if SYSTEM:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0;}",
            "=r,l,l,r",
            [box.to(tl.int64), message, mine.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(box, message, mask=mine)


@triton.jit
def receive(box, call, mine, SYSTEM: tl.constexpr):
    """The word that comes with this call, once it has come."""
    if SYSTEM:
        word = tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .b64 message; .reg .b32 number; mov.u32 $0, 0; setp.eq.s32 p, $3, 0; @p bra DONE;"
            " AGAIN: ld.relaxed.sys.global.b64 message, [$1]; mov.b64 {$0, number}, message;"
            " setp.ne.b32 p, number, $2; @p bra AGAIN; DONE: }",
            "=&r,l,r,r",
            [box.to(tl.int64), call + tl.zeros_like(mine.to(tl.int32)), mine.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        message = tl.load(box, mask=mine, other=0)
        while tl.sum((mine & ((message >> 32).to(tl.int32) != call)).to(tl.int32), 0) > 0:
            message = tl.load(box, mask=mine, other=0)
        word = message.to(tl.int32)
    return word


@triton.jit
def packed(x):
    """Numbers (PIECE, 1) of 32 bits or (PIECE, 2) of 16 as words (PIECE,)."""
    if x.shape[1] == 1:
        word = tl.reshape(x, (x.shape[0],)).to(tl.int32, bitcast=True)
    else:
        low, high = tl.split(x)
        below = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = below | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return word


@triton.jit
def unpacked(word, NUMBER: tl.constexpr):
    """What `packed` was given, as float32."""
    if NUMBER == tl.float32:  # noqa: SIM300 - a constexpr is on the left
        x = word.to(tl.float32, bitcast=True)[:, None]
    else:
        low, high = (word & 0xFFFF).to(tl.int16), ((word >> 16) & 0xFFFF).to(tl.int16)
        x = tl.join(low.to(NUMBER, bitcast=True).to(tl.float32), high.to(NUMBER, bitcast=True).to(tl.float32))
    return x


@triton.jit(do_not_specialize=("count", "rank"))
def push_sum(
    y,
    residual,
    layer_scale,
    out,
    boxes,
    addresses,
    calls,
    count,
    rank,
    scale,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    NUMBERS: tl.constexpr,
    PIECE: tl.constexpr,
    BOXES: tl.constexpr,
    SYSTEM: tl.constexpr,
    PDL: tl.constexpr,
):
    """NUMBERS: in a word; BOXES: words that a rank has for each other rank and turn."""
    go(PDL)
    piece = tl.program_id(0)
    word = piece * PIECE + tl.arange(0, PIECE)
    i = word[:, None] * NUMBERS + tl.arange(0, NUMBERS)[None, :]
    inside, mine = i < count, word * NUMBERS < count
    DTYPE: tl.constexpr = y.dtype.element_ty
    wait(PDL)
    call = tl.load(calls + piece)
    turn = (call & 1) * (SIZE * BOXES) + word
    own = packed(tl.load(y + i, mask=inside, other=0.0))
    for other in tl.static_range(SIZE):
        if other != rank:
            there = tl.load(addresses + other).to(tl.pointer_type(tl.int64))
            send(there + turn + rank * BOXES, own, call, mine, SYSTEM)
    if residual is not None:
        z = tl.load(residual + i, mask=inside, other=0.0)
    if layer_scale is not None:
        factor = tl.load(layer_scale + i % WIDTH, mask=inside, other=0.0).to(tl.float32)
    sum = tl.zeros((PIECE, NUMBERS), tl.float32)
    for other in tl.static_range(SIZE):
        said = own
        if other != rank:
            said = receive(boxes + turn + other * BOXES, call, mine, SYSTEM)
        sum += unpacked(said, DTYPE)
    if layer_scale is not None:
        sum *= factor
    sum *= scale
    if residual is not None:
        sum += z.to(tl.float32)
    tl.store(out + i, sum.to(DTYPE), mask=inside)
    tl.debug_barrier()  # every thread has read which call this is
    tl.store(calls + piece, call + 1)


def pushed(y: Tensor, residual: Tensor | None, layer_scale: Tensor | None, scale: float, box: Mailbox) -> Tensor:
    """[residual +] scale * [layer_scale *] the sum over ranks of y (..., width), all contiguous."""
    out, numbers = y.new_empty(y.shape), 4 // y.element_size()
    if not y.numel():
        return out
    with on(y):
        push_sum[(cdiv(y.numel(), PIECE * numbers),)](
            y,
            residual,
            layer_scale,
            out,
            box.memory,
            box.addresses,
            box.calls,
            y.numel(),
            box.rank,
            scale,
            WIDTH=y.shape[-1],
            SIZE=box.size,
            NUMBERS=numbers,
            PIECE=PIECE,
            BOXES=LIMIT // 4,
            SYSTEM=not interpreted(),
            num_warps=4,
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
