"""Every place of a model that holds a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of a module that holds a tensor: `name` from the model down."""

    name: str
    module: nn.Module
    kind: str  # which dict of the module: "_parameters", "_buffers" or "__dict__"
    persistent: bool

    @property
    def key(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.kind)[self.key]

    def put(self, t: Tensor) -> None:
        getattr(self.module, self.kind)[self.key] = t


def replace(slots: Sequence[Slot], new: Tensor) -> None:
    """Put a tensor into places that held one, as a parameter where that was one."""
    t = slots[0].tensor
    new = nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new
    for slot in slots:
        slot.put(new)


def slots_of(model: nn.Module) -> Iterator[Slot]:
    """Every place of the model that holds a tensor; shared modules and tied tensors under each of their names."""
    for path, m in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        yield from (Slot(prefix + n, m, "_parameters", True) for n, p in m._parameters.items() if p is not None)
        for n, b in m._buffers.items():
            if b is not None:
                yield Slot(prefix + n, m, "_buffers", n not in m._non_persistent_buffers_set)
        yield from (Slot(prefix + n, m, "__dict__", False) for n in bare(m))


def bare(module: nn.Module) -> dict[str, Tensor]:
    """Tensors on the meta device that a module keeps as plain attributes."""
    return {n: t for n, t in vars(module).items() if isinstance(t, Tensor) and t.is_meta}
