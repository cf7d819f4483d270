"""A model's dtype and device changed in place, and changed back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Cast:
    """Moves parameters and persistent float buffers to a dtype and device, one at a time.

    Non-persistent buffers keep their dtype, as `from_pretrained(dtype=...)` leaves them: rotary frequencies in half
    precision would be wrong. keep: hold on to the originals, so that `undo` is exact even after narrowing. apart: ids
    of parameters that somebody else changes, who moves a share of each alone; they are only remembered. home: where
    `undo` brings everything (None: where it was).
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        device: torch.device | None,
        keep: bool,
        apart: frozenset[int] = frozenset(),
        home: torch.device | None = None,
    ) -> None:
        self.model, self.dtype, self.device, self.keep = model, dtype, device, keep
        self.apart, self.home = apart, home
        self.were: dict[int, tuple[Tensor, torch.dtype, torch.device]] = {}  # by id: the live tensor and what it was
        self.originals: dict[int, Tensor] = {}
        self.narrowed: list[str] = []  # names whose values lost bits

    def apply(self) -> None:
        """Change every tensor that needs it; on failure everything is changed back before the error goes on."""
        try:
            for name, t, persistent in _tensors(self.model):
                self._change(name, t, persistent)
        except BaseException:
            self.undo()
            raise

    def _change(self, name: str, t: Tensor, persistent: bool) -> None:
        dtype = self.dtype if self.dtype and persistent and t.is_floating_point() else t.dtype
        device = self.device or t.device
        home = self.home or t.device
        if id(t) in self.were or (t.dtype == dtype and t.device == device == home):
            return
        self.were[id(t)] = (t, t.dtype, home)
        if t.dtype == dtype and t.device == device:
            return
        if self.keep:
            self.originals[id(t)] = t.data
        elif torch.promote_types(t.dtype, dtype) != dtype:
            self.narrowed.append(name)
        if id(t) not in self.apart:
            t.data = t.data.to(device=device, dtype=dtype)

    def undo(self) -> None:
        """The tensors as they were; narrowed ones, whose originals were not kept, in their old dtype."""
        for key, (t, dtype, device) in self.were.items():
            kept = self.originals.get(key)
            t.data = t.data.to(device=device, dtype=dtype) if kept is None else kept
        self.were.clear()
        self.originals.clear()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """(name, tensor, whether state_dict would have it)."""
    found = [(n, p, True) for n, p in model.named_parameters()]
    for path, m in model.named_modules():
        prefix = f"{path}." if path else ""
        transient = m._non_persistent_buffers_set
        found += [(prefix + n, b, n not in transient) for n, b in m.named_buffers(recurse=False)]
    return found
