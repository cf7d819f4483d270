"""The op table: one reference per op, any number of faster implementations, one rule of dispatch.

The reference is a plain torch function. It fixes the signature, the docstring and the answer; it may be slow, it may
not be clever. An implementation registers under a backend's name, says on which devices it runs and which arguments it
accepts. A call takes the first implementation, in order of registration, whose device fits and which accepts; the
reference accepts everything, so nothing falls through and nothing is chosen by exception.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hasten.errors import ConfigError

Function = Callable[..., Any]
_forced: ContextVar[str | None] = ContextVar("backend", default=None)


def always(*args: Any, **kwargs: Any) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Implementation:
    backend: str
    run: Function
    devices: frozenset[str]
    accepts: Callable[..., bool]


@dataclass(slots=True)
class Op:
    name: str
    reference: Function
    signature: inspect.Signature
    implementations: list[Implementation] = field(default_factory=list)

    def register(self, backend: str, *, devices: str, accepts: Callable[..., bool] = always) -> Callable[[Function], Function]:
        """Decorate a faster implementation. Its signature must equal the reference's; `accepts` is pure and cheap."""
        where = frozenset(devices.split())
        if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            where |= {"cpu"}

        def add(run: Function) -> Function:
            if inspect.signature(run) != self.signature:
                raise TypeError(f"{backend} {self.name}{inspect.signature(run)} differs from the reference {self.signature}")
            self.implementations.append(Implementation(backend, run, where, accepts))
            return run

        return add

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.choose(x, *args, **kwargs)(x, *args, **kwargs)

    def choose(self, x: Tensor, *args: Any, **kwargs: Any) -> Function:
        """The function that a call with these arguments runs."""
        forced = _forced.get()
        if forced == "reference":
            return self.reference
        for i in self.implementations:
            # interpreted kernels prove themselves in tests; they serve a call only when asked for by name
            wanted = i.backend == forced if forced else not (i.backend == "triton" and x.device.type == "cpu")
            if wanted and x.device.type in i.devices and i.accepts(x, *args, **kwargs):
                return i.run
        if forced:
            raise ConfigError(f"{self.name} has no {forced} implementation for {x.dtype} on {x.device.type} with these arguments")
        return self.reference

    def explain(self, x: Tensor, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        """Every candidate for this call, in order, with `chosen` or why not."""
        chosen, rows = self.choose(x, *args, **kwargs), []
        for i in self.implementations:
            if i.run is chosen:
                why = "chosen"
            elif x.device.type not in i.devices:
                why = f"runs on {', '.join(sorted(i.devices))}"
            else:
                why = "not first" if i.accepts(x, *args, **kwargs) else "does not accept these arguments"
            rows.append((i.backend, why))
        return [*rows, ("reference", "chosen" if chosen is self.reference else "not first")]


TABLE: dict[str, Op] = {}


def op(reference: Function) -> Op:
    """Make `reference` an op, and put it into the table under its own name."""
    TABLE[reference.__name__] = made = Op(reference.__name__, reference, inspect.signature(reference))
    return made


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Run every op inside on one backend, or fail; None restores free choice."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)
