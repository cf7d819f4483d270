"""What the files of a folder are, by the names that DeepSpeed gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hasten.checkpoints.files import few
from hasten.errors import WeightError

TRACKERS = ("latest", "latest_universal")
TAGS = "global_step*"
PARTS = "zero"
"""The folder of a universal checkpoint that has one folder for each parameter."""

MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
SHARED_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
EXPERT = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
WEIGHTS = (MODEL, SHARED_MODEL, LAYER, OPTIMIZER)


@dataclass(frozen=True, slots=True)
class Places:
    """The files of one tag.

    models: by tensor-parallel rank. partitioned (ZeRO 3) and optimizers: by tensor-parallel and data-parallel rank.
    layers: of a pipeline module, by layer and tensor-parallel rank. experts: by tensor-parallel rank, layer, expert.
    twice: files for one and the same rank.
    """

    folder: Path
    models: Mapping[int, Path]
    partitioned: Mapping[tuple[int, int], Path]
    optimizers: Mapping[tuple[int, int], Path]
    layers: Mapping[tuple[int, int], Path]
    experts: Mapping[tuple[int, int, int], Path]
    twice: tuple[tuple[Path, Path], ...]


def tagged(folder: Path) -> Path | None:
    """The folder of the tag that `latest` names, the only tag's, or the folder itself where it is one; else None.

    Raises WeightError where `latest` names no folder beside it, and where nothing names one of several tags.
    """
    if _is_tag(folder):
        return folder
    tracker = next((folder / n for n in TRACKERS if (folder / n).is_file()), None)
    if tracker is None:
        return _only(folder)
    tag = tracker.read_text(encoding="utf-8", errors="replace").strip()
    inside = folder / tag
    if tag in ("", ".", "..") or Path(tag).name != tag:
        raise WeightError(f"{tracker} says {tag!r:.80}: expected the name of a folder beside it")
    if not inside.is_dir():
        held = sorted(f.name for f in folder.iterdir() if f.is_dir())
        raise WeightError(
            f"{tracker} says {tag}, but {inside} does not exist; {folder} holds {few(held) or 'no folder'}"
        )
    return inside


def _only(folder: Path) -> Path | None:
    tags = sorted(f for f in folder.glob(TAGS) if f.is_dir() and _is_tag(f))
    if len(tags) > 1:
        raise WeightError(
            f"{folder} has no file latest, and {len(tags)} tags: give one of {few([t.name for t in tags])}"
        )
    return tags[0] if tags else None


def list_files(folder: Path) -> Places:
    """The files of a tag's folder, in the order of their numbers."""
    models: dict[int, Path] = {}
    partitioned: dict[tuple[int, int], Path] = {}
    optimizers: dict[tuple[int, int], Path] = {}
    layers: dict[tuple[int, int], Path] = {}
    experts: dict[tuple[int, int, int], Path] = {}
    twice: list[tuple[Path, Path]] = []
    for path in sorted(folder.iterdir()):
        if m := MODEL.fullmatch(path.name):
            models[int(m[1])] = path
        elif m := SHARED_MODEL.fullmatch(path.name):
            partitioned[int(m[2]), int(m[1])] = path
        elif m := OPTIMIZER.fullmatch(path.name):
            place = int(m[2]), int(m[1])
            twice += [(optimizers[place], path)] if place in optimizers else []
            optimizers[place] = path
        elif m := LAYER.fullmatch(path.name):
            layers[int(m[1]), int(m[2])] = path
        elif m := EXPERT.fullmatch(path.name):
            experts[int(m[3]), int(m[1] or 0), int(m[2])] = path
    return Places(
        folder,
        _ordered(models),
        _ordered(partitioned),
        _ordered(optimizers),
        _ordered(layers),
        _ordered(experts),
        tuple(twice),
    )


def universal(folder: Path) -> Mapping[str, Path]:
    """The float32 file of each parameter of a universal checkpoint, by the parameter's name; empty where it is none."""
    parts = folder / PARTS
    if not parts.is_dir():
        return {}
    return {f.parent.relative_to(parts).as_posix(): f for f in sorted(parts.rglob("fp32.pt"))}


def _is_tag(folder: Path) -> bool:
    """Whether weights lie in the folder itself."""
    named = any(pattern.fullmatch(f.name) for f in folder.iterdir() for pattern in WEIGHTS)
    return named or any((folder / PARTS).glob("*/fp32.pt"))


def _ordered(files: dict) -> Mapping:  # pyright: ignore[reportMissingTypeArgument]
    return dict(sorted(files.items()))
