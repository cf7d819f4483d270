"""Calls as CUDA graphs: what a call of the same shapes launched before is launched again, at once.

The first call of a kind runs as it is, which compiles and allocates whatever it needs; the second is recorded; the
others copy their inputs to where the recording reads them, replay it, and copy what it leaves. Nothing else differs, so
the answers are equal bit for bit. What a check wants to know of the first input, the recording finds as well.

Of ranks that divide a model each records for itself. While it does, nothing runs; a replay and the call itself make the
same exchanges in the same order; so one that cannot record, or has forgotten, leaves nobody waiting.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from hasten.inject.ahead import Extremes, asked, begin, settle, tell
from hasten.inject.early import Note, current
from hasten.ops.table import forced
from hasten.ops.workspace import Workspace

if TYPE_CHECKING:
    from hasten.inject.backbone import Backbone

Tensors = tuple[Tensor | None, ...]
Compute = Callable[..., Tensors]
KNOWN = 512  # kinds of call that are remembered


class Record(Protocol):
    def __call__(self, compute: Compute, inputs: Tensors, pool: Any) -> tuple[Callable[[], None], Tensors, Any]:
        """Record compute(*inputs): how to replay it, the outputs that a replay fills, and the pool they lie in."""
        ...


def record_cuda(compute: Compute, inputs: Tensors, pool: Any) -> tuple[Callable[[], None], Tensors, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = compute(*inputs)
    return graph.replay, outputs, graph.pool()


@dataclass(frozen=True, slots=True)
class Recording:
    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]
    extremes: Extremes | None  # of the first input

    def begin(self, inputs: Tensors) -> None:
        """Copy the inputs to where the recording reads them, and replay it."""
        mine, given = ([t for t in each if t is not None] for each in (self.inputs, inputs))
        if len(mine) == 1:
            mine[0].copy_(given[0])  # images are large, and a program of the other copies 65,536 numbers
        else:
            # one launch where dtypes are the same
            torch._foreach_copy_(mine, given)  # pyright: ignore[reportPrivateImportUsage]
        self.replay()

    def end(self) -> Tensors:
        """Copies of what the replay leaves."""
        return tuple(None if t is None else t.clone() for t in self.outputs)


@dataclass(slots=True)
class Lane:
    """What the recordings of one stream share, since no two of them run at once: counters and memory.

    lock: is held until a replay's extremes have been read, which the next replay overwrites.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    workspace: Workspace = field(default_factory=Workspace)
    pool: Any = None
    first: Callable[[], None] | None = None  # a pool whose last graph goes is gone, and none can be recorded into it


class Graphs:
    """The recorded calls of one model; the least recently used go first."""

    def __init__(self, record: Record = record_cuda, limit: int = 16) -> None:
        self._record, self._limit = record, limit
        self._lock = threading.Lock()
        self._calls: OrderedDict[Hashable, Recording | str | None] = OrderedDict()  # a text: why it cannot be recorded
        self._lanes: dict[Hashable, Lane] = {}
        self.notes: dict[Hashable, Note] = {}  # by what calls look like

    def __reduce__(self) -> Any:
        return type(self), (self._record, self._limit)  # a copy of the model records its own calls

    def __call__(
        self,
        compute: Compute,
        inputs: Tensors,
        kind: Hashable = None,
        lane: Hashable = None,
        reads: Iterable[nn.Module] = (),
    ) -> Tensors:
        """compute(*inputs), which has to depend on nothing but its inputs, `kind`, and memory that stays in place.

        lane: the stream that this call runs on. reads: modules whose tensors are of that memory.
        """
        first = inputs[0] if asked(inputs[0]) else None
        key = (kind, lane, first is not None, forced(), tuple(map(_shape, inputs)))
        own = self._lanes.get(lane) or self._lanes.setdefault(lane, Lane())
        with own.lock:
            with self._lock:
                found = self._calls.get(key)
                if isinstance(found, Recording):
                    self._calls.move_to_end(key)
                    begin(besides=first)
                else:
                    settle()  # only a replay is safe with any input
                    found = self._new(key, compute, inputs, own, first is not None)
                if not isinstance(found, Recording):
                    with own.workspace:
                        return compute(*inputs)
                guess = current(self)
                if guess is None or not guess.right(key, inputs):
                    found.begin(inputs)
                    if guess is not None and (first is not None or not guess.checked):  # else the device is asked first
                        guess.learn(key, inputs, found, own, tuple(t.detach() for t in tensors(reads)))
                outputs = found.end()
            if first is not None and found.extremes is not None:
                tell(first, found.extremes.read())
        return outputs

    def _new(
        self, key: Hashable, compute: Compute, inputs: Tensors, lane: Lane, checked: bool
    ) -> Recording | str | None:
        """What is known of a call that is not recorded, once it has been met again."""
        found = self._calls.get(key)
        if key in self._calls and found is None:
            found = self._recorded(compute, inputs, lane, checked)
        self._calls[key] = found
        self._calls.move_to_end(key)
        self._forget()
        return found

    def _recorded(self, compute: Compute, inputs: Tensors, lane: Lane, checked: bool) -> Recording | str:
        """A recording, or why there is none: only the attempt shows whether a model's own code waits for the device."""
        with torch.inference_mode(False):
            mine = tuple(None if t is None else torch.empty_like(t).copy_(t.detach()) for t in inputs)
            extremes = Extremes(mine[0], recorded=True) if checked and mine[0] is not None else None
        work = compute if extremes is None else extremes.beside(compute)
        try:
            with lane.workspace:
                replay, outputs, lane.pool = self._record(work, mine, lane.pool)
                lane.first = lane.first or replay
        except RuntimeError as error:
            lane.pool = lane.first = None  # spoilt with the recording
            cause: BaseException = error
            while cause.__context__ is not None:  # the end of a spoilt recording complains too, and last
                cause = cause.__context__
            return (str(cause).splitlines() or [type(cause).__name__])[0]
        return Recording(mine, outputs, replay, extremes)

    def _forget(self) -> None:
        recorded = [k for k, v in self._calls.items() if isinstance(v, Recording)]
        for key in recorded[: max(len(recorded) - self._limit, 0)]:
            del self._calls[key]
        while len(self._calls) > KNOWN:
            self._calls.popitem(last=False)

    def clear(self) -> None:
        """Forget every call: the memory that they read has moved."""
        with self._lock:
            self._calls.clear()
            self._lanes.clear()
            self.notes.clear()

    def stream(self, inputs: Tensors) -> Hashable:
        """`lane_of`."""
        return lane_of(inputs)

    @property
    def recorded(self) -> int:
        return sum(isinstance(v, Recording) for v in self._calls.values())

    @property
    def refused(self) -> tuple[str, ...]:
        """Why some kinds of call run as they are."""
        return tuple(dict.fromkeys(v for v in self._calls.values() if isinstance(v, str)))


def run(b: Backbone, compute: Compute, inputs: Tensors, kind: Hashable, modules: Sequence[nn.Module]) -> Tensors:
    """compute(*inputs), replayed where that can be. `modules` are the model's own that it runs.

    What they are and where their tensors lie is a part of what a recording depends on, and is looked up at every call;
    the backbone says when the fused weights move. The call's checks are settled when this returns.
    """
    lane = None if b.graphs is None else lane_of(inputs)
    own = None if lane is None else held(modules)
    if b.graphs is None or own is None:
        settle()
        return compute(*inputs)
    outputs = b.graphs(compute, inputs, (kind, own, tuple(b.transformer.backends.items())), lane, modules)
    settle()
    return outputs


def lane_of(inputs: Iterable[Tensor | None]) -> Hashable:
    """The stream on which a call with these inputs may be recorded, or None where it has to run as it is."""
    given = [t for t in inputs if t is not None]
    if not all(t.is_cuda for t in given) or torch.cuda.is_current_stream_capturing():
        return None
    if torch.is_autocast_enabled("cuda"):
        return None
    return torch._C._cuda_getCurrentRawStream(given[0].get_device())  # current_stream makes an object of it, at leisure


def held(modules: Iterable[nn.Module]) -> tuple[Hashable, ...] | None:
    """Every module within these and the addresses of its tensors; None where a replay cannot stand for their calls.

    It can where nobody looks on, and nobody wants gradients of their weights.
    """
    tracked, found = torch.is_grad_enabled(), []
    for m in (inner for outer in modules for inner in within(outer)):
        if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__:
            return None
        found.append(m)  # and not its id, which another module gets when it is gone
        for t in (*m._parameters.values(), *m._buffers.values()):
            if t is not None:
                if tracked and t.requires_grad:
                    return None
                found.append(t.data_ptr())
    return tuple(found)


def tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The parameters and buffers of modules and of all within."""
    held = (t for outer in modules for m in within(outer) for t in (*m._parameters.values(), *m._buffers.values()))
    return (t for t in held if t is not None)


def within(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all below it, as `modules()` gives them but for repeating what is shared; four times as fast."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from within(child)


def _shape(t: Tensor | None) -> Hashable:
    return None if t is None else (t.shape, t.dtype, t.device, t.stride())
