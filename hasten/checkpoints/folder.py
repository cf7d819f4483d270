"""From what a user calls a checkpoint to a Source: by its files, never by the names of models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.checkpoints.deepspeed.source import open_training
from hasten.checkpoints.described import CONFIG, Description, describes, read_description, read_json
from hasten.checkpoints.distributed import METADATA
from hasten.checkpoints.files import Files, Opened, few, read_index
from hasten.checkpoints.megatron.core import open_distributed
from hasten.checkpoints.megatron.places import RANK, in_folder, in_list, newest
from hasten.checkpoints.megatron.source import open_ranks
from hasten.checkpoints.pickles import Pickle
from hasten.checkpoints.safetensors import Safetensors
from hasten.checkpoints.source import Source, StateDict
from hasten.checkpoints.split import open_split
from hasten.errors import ConfigError

FORMATS = {".safetensors": Safetensors, ".bin": Pickle, ".pt": Pickle, ".pth": Pickle}

USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that a folder is read from: the first that is there."""

LATER = {
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "*.gguf": "GGUF",
}
"""Files of formats that are known and not read yet."""

EXPECTED = (
    f"a folder with {' or '.join(USUAL)}, one such file (any *{', *'.join(FORMATS)}), or a dict of tensors by name"
)


def open_checkpoint(where: object, base: str = "") -> Source:
    """The source that `where` names: a folder, a file, a dict of tensors, or a Source already.

    A relative path lies in the folder `base`. Raises ConfigError for a path that holds no checkpoint of a known format,
    and WeightError for one whose files are missing, damaged or hostile. No tensor is read.
    """
    if isinstance(where, Mapping):
        return _mapping(where, base)
    if isinstance(where, Source):
        return where
    if not isinstance(where, (str, os.PathLike)):
        raise ConfigError(f"checkpoint={where!r:.80}: expected {EXPECTED}")
    path = Path(base, os.fsdecode(where)).expanduser()
    if path.is_dir():
        if (path / CONFIG).is_file():
            return _described(read_description(read_json(path / CONFIG), str(path / CONFIG), [path], inside=True))
        if _found(path) is not None:
            return _file(_usual(path), path)
        return open_training(path) or _ranks(path) or _file(_usual(path), path)
    if not path.exists():
        raise ConfigError(f"checkpoint: {path} does not exist; expected {EXPECTED}")
    return _file(path, path)


def _mapping(where: Mapping[Any, Any], base: str) -> Source:
    if describes(where):
        return _described(read_description(where, "the dict", [Path(base).expanduser()]))
    odd = [repr(n) for n, t in where.items() if not (isinstance(n, str) and isinstance(t, Tensor))]
    if odd or not where:
        raise ConfigError(f"checkpoint is a dict whose {few(odd) or 'tensors are missing'}: expected {EXPECTED}")
    return StateDict({str(n): t for n, t in where.items() if isinstance(t, Tensor)})


def _ranks(folder: Path) -> Source | None:
    """Files of Megatron's ranks or of torch.distributed.checkpoint, where the folder has them."""
    inside = newest(folder)
    if (inside / METADATA).is_file():
        return open_distributed(inside)
    if inside != folder or any(RANK.fullmatch(f.name) and f.is_dir() for f in folder.iterdir()):
        return open_ranks(folder, in_folder(inside))
    return None


def _found(folder: Path) -> Path | None:
    return next((folder / n for n in USUAL if (folder / n).is_file()), None)


def _usual(folder: Path) -> Path:
    if (found := _found(folder)) is not None:
        return found
    known = next((kind for pattern, kind in LATER.items() if any(folder.glob(pattern))), None)
    if known is not None:
        raise ConfigError(_later(f"{folder}, which holds a checkpoint of {known}"))
    held = sorted(f.name for f in folder.iterdir())
    raise ConfigError(f"checkpoint: {folder} {f'holds only {few(held)}' if held else 'is empty'}; expected {EXPECTED}")


def _file(path: Path, origin: Path) -> Source:
    suffixes = path.name.lower()
    if suffixes.endswith(".index.json"):
        shards = read_index(path)
        endings = {f.suffix for f in shards}
        if len(endings) > 1 or not endings <= FORMATS.keys():
            raise ConfigError(
                f"{path} names files *{', *'.join(sorted(endings))}: expected one of *{', *'.join(FORMATS)}"
            )
        return Files(origin, shards, FORMATS[endings.pop()])
    if path.suffix in FORMATS:
        return Files(origin, {path: ()}, FORMATS[path.suffix])
    if path.suffix == ".json":
        return _described(read_description(read_json(path), str(path), [path.parent, Path()]))
    raise ConfigError(f"checkpoint: {path} is of no known format; expected {EXPECTED}")


def _described(d: Description) -> Source:
    """The source of the files that a description names."""
    origin = Path(d.origin) if Path(d.origin).is_file() else d.files[0].parent
    listed = d.files
    if len(listed) == 1 and listed[0].is_dir():
        if d.type == "megatron":
            return open_ranks(origin, in_folder(newest(listed[0])), d.version, d.module_key)
        listed = tuple(sorted(f for f in listed[0].iterdir() if f.suffix in FORMATS))
    if d.type == "megatron":
        return open_ranks(origin, in_list(listed, d.ranks, d.stages), d.version, d.module_key)
    if odd := [str(f) for f in (*listed, *d.shared) if f.suffix not in FORMATS]:
        raise ConfigError(f"{d.origin} names {few(odd)}: expected files *{', *'.join(FORMATS)}")
    if not d.split:
        return Files(origin, {f: () for f in listed}, _start)
    return open_split(str(origin), listed, d.shared, d.ranks, _start, d.splits)


def _start(path: Path) -> Opened:
    return FORMATS[path.suffix](path)


def _later(what: str) -> str:
    return (
        f"checkpoint={what}, is not supported by this version, which reads {EXPECTED}, and checkpoints of DeepSpeed, "
        "Megatron and torch.distributed: convert it, or load the weights into the model (load_state_dict) before "
        "init_inference"
    )
