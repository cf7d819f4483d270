"""Which file is which rank's: by the names that Megatron gives its folders, or by the order of a list."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hasten.checkpoints.files import few
from hasten.errors import ConfigError, WeightError

RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?(?:_model_states\.pt)?")
TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """Where a rank stands: its part of each tensor, its stage of layers, its experts."""

    tensor: int
    stage: int = 0
    expert: int = 0

    def __str__(self) -> str:
        more = f", pipeline stage {self.stage}" if self.stage else ""
        return f"tensor-parallel rank {self.tensor}{more}" + (
            f", expert-parallel rank {self.expert}" if self.expert else ""
        )


Places = Mapping[Rank, Path]


def newest(folder: Path) -> Path:
    """The folder of the iteration that Megatron's tracker file names; the folder itself where there is no such file."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    said = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if said != "release" and not said.isdecimal():
        raise WeightError(f"{tracker} says {said!r:.40}: expected a number or 'release'")
    inside = folder / ("release" if said == "release" else f"iter_{int(said):07d}")
    if inside.is_dir():
        return inside
    held = sorted(f.name for f in folder.iterdir() if f.is_dir())
    raise WeightError(f"{tracker} says {said}, but {inside} does not exist; {folder} holds {few(held) or 'no folder'}")


def in_folder(folder: Path) -> Places:
    """The ranks' files of one iteration's folder."""
    files = {f.name: f / FILE for f in folder.iterdir() if f.is_dir() and RANK.fullmatch(f.name)}
    if not files:
        raise WeightError(f"{folder} holds no mp_rank_XX/{FILE}")
    return {_rank(name): path for name, path in files.items()}


def in_list(files: Sequence[Path], tensor: int, stages: int) -> Places:
    """The ranks of listed files: by mp_rank_XX in their paths where all have it, else stage by stage, rank by rank.

    Raises ConfigError where their number is not `tensor` times `stages`.
    """
    if len(files) != tensor * stages:
        raise ConfigError(
            f"checkpoints lists {len(files)} files, but mp_size={tensor} and pp_size={stages} need {tensor * stages}"
        )
    named = [next((p for p in reversed(f.parts) if RANK.fullmatch(p)), None) for f in files]
    if all(named):
        ranks = [_rank(str(n)) for n in named]
        if len(set(ranks)) == len(ranks):
            return dict(zip(ranks, files, strict=True))
    return {Rank(i % tensor, i // tensor): f for i, f in enumerate(files)}


def sizes(ranks: Collection[Rank]) -> Rank:
    """How many ranks there are along each axis, by the highest number."""
    return Rank(*(max(n) + 1 for n in zip(*((r.tensor, r.stage, r.expert) for r in ranks), strict=True)))


def holes(ranks: Collection[Rank]) -> list[Rank]:
    """Every rank that the others' numbers say there must be, and that is not there."""
    n = sizes(ranks)
    every = [Rank(t, s, e) for s in range(n.stage) for e in range(n.expert) for t in range(n.tensor)]
    return [rank for rank in every if rank not in ranks]


def _rank(name: str) -> Rank:
    found = RANK.fullmatch(name)
    assert found is not None
    return Rank(*(int(n or 0) for n in found.groups()))
