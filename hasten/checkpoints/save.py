"""Models written as ranks share them, so that each reads its own files: safetensors, and a description of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten.checkpoints.described import CONFIG
from hasten.checkpoints.split import Cut
from hasten.errors import ConfigError

PIECE = 1 << 30
"""Bytes of one rank's file, about; so much is in memory beside the model."""


def save_split(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], cuts: Mapping[str, Cut], ranks: int, piece: int = PIECE
) -> Path:
    """Write `tensors` by name for `ranks` ranks, cut as `cuts` says, and what it does not name once for all.

    A tensor that comes under several names is written under the first. The description's path is returned, which
    init_inference(model, checkpoint=...) takes for any number of devices, and so does the folder's.
    ConfigError where the folder holds other files, or a tensor cannot be cut.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: split weights are written to a folder of their own")
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder, ranks, piece)
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    written: dict[str, Cut] = {}
    dtype = ""
    for name, t in tensors:
        if t.numel() and (t.data_ptr(), t.shape, t.stride()) in seen:
            continue
        seen.add((t.data_ptr(), t.shape, t.stride()))
        dtype = dtype or (str(t.dtype).removeprefix("torch.") if t.is_floating_point() else "")
        if name in cuts and ranks > 1:
            written[name] = cuts[name]
            writer.add([_share(name, t, cuts[name], rank, ranks) for rank in range(ranks)], name)
        else:
            writer.share(name, t)
    tp, shared = writer.finish()
    description = {
        "type": "ds_model",
        "version": 1.0,
        "parallelization": "tp",
        "tp_size": ranks,
        "dtype": dtype,
        "base_dir": str(folder.resolve()),
        "checkpoints": {"non_tp": shared, "tp": tp},
        "splits": {n: [c.axis, list(c.parts)] for n, c in written.items()},
    }
    path = folder / CONFIG
    path.write_text(json.dumps(description, indent=1), encoding="utf-8")
    return path


def _share(name: str, t: Tensor, cut: Cut, rank: int, ranks: int) -> Tensor:
    rows = t.shape[cut.axis]
    unit, rest = divmod(rows, sum(cut.parts))
    if rest or any(unit * n % ranks for n in cut.parts):
        raise ConfigError(f"{name} {tuple(t.shape)} cannot be cut for {ranks} ranks along axis {cut.axis}")
    parts = t.split([unit * n for n in cut.parts], cut.axis)
    own = [p.narrow(cut.axis, p.shape[cut.axis] // ranks * rank, p.shape[cut.axis] // ranks) for p in parts]
    return torch.cat(own, cut.axis) if len(own) > 1 else own[0]


class _Writer:
    """Files of all ranks, a piece of each at a time."""

    def __init__(self, folder: Path, ranks: int, piece: int) -> None:
        self.folder, self.ranks, self.piece = folder, ranks, piece
        self.tp: list[str] = []
        self.non_tp: list[str] = []
        self._held: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
        self._shared: dict[str, Tensor] = {}

    def add(self, shares: list[Tensor], name: str) -> None:
        for held, t in zip(self._held, shares, strict=True):
            held[name] = t.detach().to("cpu", copy=True).contiguous()
        if sum(t.nbytes for t in self._held[0].values()) * self.ranks >= self.piece:
            self._flush()

    def share(self, name: str, t: Tensor) -> None:
        self._shared[name] = t.detach().to("cpu", copy=True).contiguous()
        if sum(s.nbytes for s in self._shared.values()) >= self.piece:
            self._flush_shared()

    def finish(self) -> tuple[list[str], list[str]]:
        """The names of files: split ones piece after piece, in each all ranks; and those of all ranks."""
        if self._held[0] or not self.tp:
            self._flush()
        if self._shared:
            self._flush_shared()
        return self.tp, self.non_tp

    def _flush(self) -> None:
        piece = len(self.tp) // self.ranks
        for rank, held in enumerate(self._held):
            self.tp.append(f"tp_{rank:02d}_{piece:02d}.safetensors")
            save_file(held, self.folder / self.tp[-1])
            held.clear()

    def _flush_shared(self) -> None:
        number = f"-{len(self.non_tp):02d}" if self.non_tp else ""
        self.non_tp.append(f"non-tp{number}.safetensors")
        save_file(self._shared, self.folder / self.non_tp[-1])
        self._shared.clear()
