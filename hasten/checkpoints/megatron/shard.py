"""One rank's file (model_optim_rng.pt): its tensors under plain names, and what it says about itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from hasten.checkpoints.files import few
from hasten.checkpoints.megatron.naming import flat, plain
from hasten.checkpoints.pickles import fields_of, load
from hasten.errors import WeightError

CHUNK = re.compile(r"model\d+")
CONTAINERS = ("model", "module")


@dataclass(frozen=True, slots=True)
class Shard:
    """`chunks` are the pieces of the model that one rank holds: one, or with a virtual pipeline several.

    version: the file's checkpoint_version, None where it has none. core: whether names are Megatron-Core's, whose
    query, key and value have one order only. arguments: of the training run, empty where they were not stored.
    """

    path: Path
    chunks: tuple[Mapping[str, Tensor], ...]
    version: float | None
    core: bool
    arguments: Mapping[str, Any]
    iteration: int | None
    ranks: int | None


def open_shard(path: Path, module_key: str | None = None) -> Shard:
    """The file, mapped. module_key: the entry that holds the model; None: `model` or `module`, or all of the file.

    Raises WeightError for a file that is missing, damaged or hostile, or holds no model.
    """
    if not path.is_file():
        raise WeightError(f"{path}: there is no such file")
    content = load(path)
    if not isinstance(content, Mapping):
        raise WeightError(f"{path} holds no dict but a {type(content).__name__}")
    trees = _trees(path, content, module_key)
    chunks = [_tensors(path, tree) for tree in trees]
    raw = [name for tree in trees for name, _ in flat(tree)]
    return Shard(
        path,
        tuple(chunks),
        _number(path, content, "checkpoint_version"),
        not any(".query_key_value." in n for n in raw),
        fields_of(content.get("args")),
        cast("int | None", _number(path, content, "iteration")),
        cast("int | None", _number(path, content, "mp_world_size")),
    )


def _trees(path: Path, content: Mapping[Any, Any], module_key: str | None) -> list[Mapping[Any, Any]]:
    chunks = sorted((k for k in content if isinstance(k, str) and CHUNK.fullmatch(k)), key=lambda k: int(k[5:]))
    if module_key is not None and module_key in content:
        names = [module_key]
    elif chunks:
        names = chunks
    else:
        names = [k for k in CONTAINERS if isinstance(content.get(k), Mapping)]
        if len(names) > 1:
            raise WeightError(f"{path} has both {' and '.join(names)}: say which with module_key")
    if not names and ("args" in content or "checkpoint_version" in content):
        raise WeightError(f"{path} holds no model: it has {few(sorted(map(str, content)))}")
    trees = [content[k] for k in names] or [content]
    if odd := [k for k, t in zip(names, trees, strict=False) if not isinstance(t, Mapping)]:
        raise WeightError(f"{path}: {few(odd)} is no dict of tensors")
    return trees


def _tensors(path: Path, tree: Mapping[Any, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    odd: list[str] = []
    twice: list[str] = []
    for name, value in flat(tree):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.is_meta:
            odd.append(f"{name} ({type(value).__name__})")
            continue
        twice += [name] if plain(name) in found else []
        found[plain(name)] = value.detach()
    if odd:
        raise WeightError(f"{path} holds more than tensors in its model: {few(odd)}")
    if twice:
        raise WeightError(f"{path} has two stacks of layers ({few(twice)}): T5 and its like are not read")
    if not found:
        raise WeightError(f"{path} holds no tensors")
    return found


def _number(path: Path, content: Mapping[Any, Any], name: str) -> float | int | None:
    value = content.get(name)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise WeightError(f"{path}: {name} is {value!r:.40}, which is no number")
