"""Checkpoints of torch.distributed.checkpoint: a folder with .metadata and *.distcp files, tensors in chunks."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.checkpoints.files import few, first_line, together
from hasten.checkpoints.pickles import Record
from hasten.checkpoints.source import Entry
from hasten.errors import WeightError

METADATA = ".metadata"
TRAINING = ("optimizer.", "optim.", "rng_state", "rerun_state_machine")
"""What names of tensors begin with that no model has."""

INERT = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "Path", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "Path", "PurePosixPath"},
}
"""Classes in .metadata, none of which is run: their fields are read from stand-ins."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in INERT.get(module, ()):
            return Record
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and where its bytes are: an archive of torch.save inside a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


class Distributed:
    """A Source of one folder. Each chunk is read when a part of it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises WeightError with everything that is missing, damaged or hostile; no tensor is read."""
        self.origin = str(folder)
        metadata = _read(folder / METADATA)
        self._chunks: dict[str, tuple[Chunk, ...]] = {}
        self.entries: dict[str, Entry] = {}
        problems: list[str] = []
        places = _places(metadata, folder)
        for name, tensor in _tensors(metadata):
            shape, dtype = tuple(tensor.size), tensor.properties.parts[0]
            chunks, absent = _chunks_of(name, tensor, places)
            problems += absent
            if chunks:
                self._chunks[name] = chunks
                self.entries[name] = Entry(shape, dtype, str(chunks[0].file))
        problems += _cut_off(self._chunks)
        if problems or not self.entries:
            raise WeightError(together(f"{folder} cannot be loaded", problems or ["it holds no tensors"]))

    def cuts(self, name: str) -> int:
        """In how many pieces the tensor's first axis is cut."""
        return len({c.offsets[:1] for c in self._chunks[name]})

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        entry = self.entries[name]
        full = (*index, *(slice(None) for _ in entry.shape[len(index) :]))
        box = [s.indices(n)[:2] for s, n in zip(full, entry.shape, strict=True)]
        out: Tensor | None = None
        for chunk in self._chunks[name]:
            bounds = [
                (max(low, at), min(high, at + n))
                for (low, high), at, n in zip(box, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(low >= high for low, high in bounds):
                continue
            inside = tuple(slice(a - at, b - at) for (a, b), at in zip(bounds, chunk.offsets, strict=True))
            part = _load(chunk, name)[inside]
            if bounds == [tuple(b) for b in box]:
                return part
            out = torch.empty([max(0, b - a) for a, b in box], dtype=entry.dtype) if out is None else out
            out[tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(bounds, box, strict=True))] = part
        return torch.empty([max(0, b - a) for a, b in box], dtype=entry.dtype) if out is None else out


def _read(path: Path) -> Any:
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if isinstance(metadata.state_dict_metadata, Mapping) and isinstance(metadata.storage_data, Mapping):
            return metadata
        raise WeightError(f"{path} does not say which tensors lie where")
    except pickle.UnpicklingError as e:
        raise WeightError(f"{path} is refused: its pickle holds more than metadata, and could run code: {e}") from e
    except WeightError:
        raise
    except Exception as e:  # what a damaged pickle raises depends on where it is damaged
        raise WeightError(f"{path} is damaged: {first_line(e)}") from e


def _tensors(metadata: Any) -> Iterator[tuple[str, Any]]:
    for name, value in metadata.state_dict_metadata.items():
        if hasattr(value, "chunks") and not name.startswith(TRAINING):
            yield str(name), value


def _places(metadata: Any, folder: Path) -> dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]]:
    """File, start and length of the chunk of a tensor at an offset."""
    places: dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]] = {}
    outside: list[str] = []
    for index, info in metadata.storage_data.items():
        if Path(info.relative_path).name != info.relative_path:
            outside.append(str(info.relative_path))
        if getattr(info, "transform_descriptors", None):
            raise WeightError(
                f"{folder} keeps its chunks transformed ({info.transform_descriptors}), which is not read"
            )
        offset = tuple(getattr(index, "offset", None) or ())
        places[index.fqn, offset] = folder / str(info.relative_path), info.offset, info.length
    if outside:
        raise WeightError(f"{folder / METADATA} names files outside its folder: {few(outside)}")
    return places


def _chunks_of(
    name: str, tensor: Any, places: Mapping[Any, tuple[Path, int, int]]
) -> tuple[tuple[Chunk, ...], list[str]]:
    chunks = []
    problems = []
    for c in tensor.chunks:
        place = places.get((name, tuple(c.offsets)))
        if place is None:
            problems.append(f"{name}: no file has the chunk at {tuple(c.offsets)}")
        else:
            chunks.append(Chunk(tuple(c.offsets), tuple(c.sizes), *place))
    held = sum(torch.Size(c.sizes).numel() for c in chunks)
    if not problems and held != torch.Size(tensor.size).numel():
        problems.append(
            f"{name}: its chunks hold {held} numbers, and {tuple(tensor.size)} has {torch.Size(tensor.size).numel()}"
        )
    return tuple(chunks), problems


def _cut_off(chunks: Mapping[str, tuple[Chunk, ...]]) -> list[str]:
    """Files that are missing, or end before their last chunk does."""
    ends: dict[Path, dict[str, int]] = {}
    for name, several in chunks.items():
        for c in several:
            held = ends.setdefault(c.file, {})
            held[name] = max(held.get(name, 0), c.start + c.length)
    problems = []
    for file, names in sorted(ends.items()):
        if not file.is_file():
            problems.append(f"{file}: there is no such file, which holds {few(list(names))}")
            continue
        size = file.stat().st_size
        if beyond := [n for n, end in names.items() if end > size]:
            problems.append(f"{file} ends after {size} bytes of {max(names.values())}, and cuts off {few(beyond)}")
    return problems


def _load(chunk: Chunk, name: str) -> Tensor:
    try:
        with chunk.file.open("rb") as file:
            file.seek(chunk.start)
            held = torch.load(io.BytesIO(file.read(chunk.length)), map_location="cpu", weights_only=True)
    except Exception as e:  # what a damaged archive raises depends on where it is damaged
        raise WeightError(f"{chunk.file}: {name} cannot be read: {first_line(e)}") from e
    if not isinstance(held, Tensor) or tuple(held.shape) != chunk.sizes:
        raise WeightError(f"{chunk.file}: {name} is not the tensor of {chunk.sizes} that {METADATA} says it is")
    return held
