"""The op table: one reference per op, any number of faster implementations, one rule of dispatch.

The reference is a plain torch function. It fixes the signature, the docstring and the answer; it may be slow, it may
not be clever. An implementation registers under a backend's name, says on which devices it runs and which arguments it
accepts. A call takes the first implementation, in order of registration, whose device fits and which accepts; the
reference accepts everything, so nothing falls through and nothing is chosen by exception.

Inside `with invariant()` a row's answer must not depend on the rows beside it. Only what says so of itself serves
there, and a call that nothing of the kind accepts is an error.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hasten.errors import ConfigError

Function = Callable[..., Any]
INVARIANT = "batch-invariant"  # in place of a backend's name
_forced: ContextVar[str | None] = ContextVar("backend", default=None)


def always(*args: Any, **kwargs: Any) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Implementation:
    backend: str
    run: Function
    devices: frozenset[str]
    accepts: Callable[..., bool]
    invariant: bool = False  # inside `invariant()` a row's answer is the same bits whatever the other rows are


@dataclass(slots=True)
class Op:
    name: str
    reference: Function
    signature: inspect.Signature
    invariant: bool = False  # of the reference, whose parts are ops or element by element
    implementations: list[Implementation] = field(default_factory=list)
    serving: dict[str, tuple[Implementation, ...]] = field(default_factory=dict)  # device -> those a free choice tries

    def register(
        self, backend: str, *, devices: str, accepts: Callable[..., bool] = always, invariant: bool = False
    ) -> Callable[[Function], Function]:
        """Decorate a faster implementation. Its signature must equal the reference's; `accepts` is pure and cheap."""
        where = serving = frozenset(devices.split())
        if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            # interpreted kernels prove themselves in tests; they serve a call only when asked for by name
            where, serving = where | {"cpu"}, where - {"cpu"}

        def add(run: Function) -> Function:
            if (found := inspect.signature(run)) != self.signature:
                raise TypeError(f"{backend} {self.name}{found} differs from the reference {self.signature}")
            made = Implementation(backend, run, where, accepts, invariant)
            self.implementations.append(made)
            for device in serving:
                self.serving[device] = (*self.serving.get(device, ()), made)
            return run

        return add

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _forced.get() is None:  # what `choose` does, said again: a token passes here a hundred times
            for i in self.serving.get("cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type, ()):
                if i.accepts(x, *args, **kwargs):
                    return i.run(x, *args, **kwargs)
            return self.reference(x, *args, **kwargs)
        return self.choose(x, *args, **kwargs)(x, *args, **kwargs)

    def choose(self, x: Tensor, *args: Any, **kwargs: Any) -> Function:
        """The function that a call with these arguments runs."""
        forced = _forced.get()
        if forced == INVARIANT:
            return self._invariant(x, *args, **kwargs)
        if forced is not None:
            return self._asked_for(forced, x, *args, **kwargs)
        # is_cpu costs a tenth of device.type, which makes two objects
        for i in self.serving.get("cpu" if x.is_cpu else x.device.type, ()):
            if i.accepts(x, *args, **kwargs):
                return i.run
        return self.reference

    def _asked_for(self, backend: str, x: Tensor, *args: Any, **kwargs: Any) -> Function:
        if backend == "reference":
            return self.reference
        device = x.device.type
        for i in self.implementations:
            if i.backend == backend and device in i.devices and i.accepts(x, *args, **kwargs):
                return i.run
        raise ConfigError(f"{self.name} has no {backend} implementation for {x.dtype} on {device} with these arguments")

    def _invariant(self, x: Tensor, *args: Any, **kwargs: Any) -> Function:
        device = x.device.type
        for i in self.implementations:
            if i.invariant and device in i.devices and i.accepts(x, *args, **kwargs):
                return i.run
        if self.invariant:
            return self.reference
        raise ConfigError(
            f"{self.name} has no batch-invariant implementation for {x.dtype} on {device} with these arguments"
        )

    def explain(self, x: Tensor, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        """Every candidate for this call, in order, with `chosen` or why not."""
        chosen, rows = self.choose(x, *args, **kwargs), []
        for i in self.implementations:
            if i.run is chosen:
                why = "chosen"
            elif x.device.type not in i.devices:
                why = f"runs on {', '.join(sorted(i.devices))}"
            elif i not in self.serving.get(x.device.type, ()):
                why = "interpreted: only when asked for"
            else:
                why = "not first" if i.accepts(x, *args, **kwargs) else "does not accept these arguments"
            rows.append((i.backend, why))
        return [*rows, ("reference", "chosen" if chosen is self.reference else "not first")]


TABLE: dict[str, Op] = {}


def op(reference: Function) -> Op:
    """Make `reference` an op, and put it into the table under its own name."""
    TABLE[reference.__name__] = made = Op(reference.__name__, reference, inspect.signature(reference))
    return made


def op_by_rows(reference: Function) -> Op:
    """The same for a reference that is made of other ops and of what is done element by element."""
    made = op(reference)
    made.invariant = True
    return made


def forced() -> str | None:
    """The backend that every op runs on here, if `use` says so."""
    return _forced.get()


def is_invariant() -> bool:
    """Whether a row's answer must not depend on the rows beside it."""
    return _forced.get() == INVARIANT


def invariant() -> AbstractContextManager[None]:
    """Inside, each row's answer is the same bits whatever other rows there are, or the call fails."""
    return use(INVARIANT)


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Run every op inside on one backend, or fail; None restores free choice."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)
