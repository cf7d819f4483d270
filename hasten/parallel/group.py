"""A group of processes, each with one rank in it, that call the same things in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hasten.errors import RequestError


class Group(Protocol):
    """What a model needs of the processes that share it; every call is made by all of them, and gives no gradients."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, t: Tensor) -> Tensor:
        """The sum over the ranks, in t's own memory, which is contiguous."""
        ...

    def all_gather(self, t: Tensor) -> Tensor:
        """Every rank's t (..., n) side by side, rank 0 first: (..., size * n)."""
        ...

    def share(self, value: Any) -> Any:
        """What rank 0 gives, a small value that can be pickled; the host waits."""
        ...


class Coming(Protocol):
    """A tensor on its way."""

    def wait(self) -> Tensor:
        """The tensor, once it is there, or has left: whatever the device does from here on does it behind that."""
        ...


class Chain(Group, Protocol):
    """Processes of which each goes on with what the one in front has made."""

    def send(self, t: Tensor, to: int) -> Coming:
        """Begin to send t to one rank, which receives it; nobody may write into t before it has left."""
        ...

    def receive(self, like: Tensor, source: int) -> Tensor:
        """What that rank sends, of the shape and dtype of `like`."""
        ...

    def broadcast(self, t: Tensor, source: int) -> Coming:
        """Begin to give every rank the t of `source`; the others' is like it. A call of all ranks."""
        ...

    def tell(self, value: Any, source: int) -> Any:
        """What `source` gives, as `share` does."""
        ...


def exchanged(t: Tensor, exchange: Callable[[Tensor], Tensor]) -> Tensor:
    wanted = torch.is_grad_enabled() and t.requires_grad
    return _Exchanged.apply(t, exchange) if wanted else exchange(t)  # pyright: ignore[reportReturnType]


class _Exchanged(torch.autograd.Function):
    """An exchange that a gradient does not pass: torch.distributed would let a wrong one through."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, exchange: Callable[[Tensor], Tensor]) -> Tensor:
        heard = exchange(t)
        if heard is t:
            ctx.mark_dirty(t)
        return heard

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RequestError(
            "a model that several ranks share gives no gradients: take them on one rank, without mp_size and pp_size"
        )


class Underway:
    """A tensor that torch.distributed moves, from or into memory which this keeps."""

    def __init__(self, t: Tensor, work: Any) -> None:
        self._t, self._work = t, work

    def wait(self) -> Tensor:
        self._work.wait()
        return self._t


class Processes:
    """A group of torch.distributed, of which this process is a member."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: Any) -> Processes:
        return self

    def all_reduce(self, t: Tensor) -> Tensor:
        return exchanged(t, self._sum)

    def all_gather(self, t: Tensor) -> Tensor:
        return exchanged(t, self._gathered)

    def _sum(self, t: Tensor) -> Tensor:
        dist.all_reduce(t, group=self.group)
        return t

    def _gathered(self, t: Tensor) -> Tensor:
        pieces = t.new_empty(self.size * t.numel())  # flat, since gloo and NCCL disagree on other shapes
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(pieces, t.flatten(), group=self.group)
        return torch.cat(pieces.view(self.size, *t.shape).unbind(), -1)

    def share(self, value: Any) -> Any:
        return self.tell(value, 0)

    def tell(self, value: Any, source: int) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=self._number(source), group=self.group)
        return box[0]

    def send(self, t: Tensor, to: int) -> Underway:
        t = t.detach().contiguous()
        return Underway(t, dist.isend(t, self._number(to), group=self.group))

    def receive(self, like: Tensor, source: int) -> Tensor:
        t = torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False)
        work = dist.irecv(t, self._number(source), group=self.group)
        assert work is not None, "this process is a member of the group"
        work.wait()
        return t

    def broadcast(self, t: Tensor, source: int) -> Underway:
        if self.rank == source:
            t = t.detach().contiguous()
        else:
            t = torch.empty_like(t, memory_format=torch.contiguous_format, requires_grad=False)
        return Underway(t, dist.broadcast(t, self._number(source), group=self.group, async_op=True))

    def _number(self, rank: int) -> int:
        """The rank in the world that torch.distributed counts by."""
        return dist.get_global_rank(self.group, rank)
