"""Checkpoints that a JSON file or a dict describes, as DeepSpeed-Inference takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hasten.checkpoints.files import together
from hasten.errors import ConfigError

CONFIG = "ds_inference_config.json"
"""The description in a folder of split weights."""

TYPES = ("megatron", "ds_model", "bloom")
KEYS = {
    "type": (str,),
    "version": (int, float),
    "checkpoints": (list, tuple, dict, str),
    "parallelization": (str,),
    "tp_size": (int,),
    "mp_size": (int,),
    "pp_size": (int,),
    "base_dir": (str,),
    "module_key": (str,),
    "dtype": (str,),
    "splits": (dict,),
}
"""Every key, and what its value may be; `dtype` only informs, `splits` is written by hasten.checkpoints.save."""


@dataclass(frozen=True, slots=True)
class Description:
    """`files` are those of ranks, or all there are; `shared` those of tensors that all ranks have whole.

    split: whether tensors are split over `ranks` files, of which `stages` follow each other for each rank.
    """

    origin: str
    type: str
    version: float | None
    files: tuple[Path, ...]
    shared: tuple[Path, ...]
    split: bool
    ranks: int
    stages: int
    module_key: str | None
    splits: Mapping[str, Any] | None


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file. Raises ConfigError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ConfigError(f"checkpoint: {path} cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"checkpoint: {path} is no JSON: {e}") from e
    if not isinstance(content, dict):
        raise ConfigError(f"checkpoint: {path} must hold a JSON object, not a {type(content).__name__}")
    return content


def describes(content: Mapping[Any, Any]) -> bool:
    """Whether a dict describes files, rather than being a state dict."""
    return any(k in content and not hasattr(content[k], "shape") for k in ("type", "checkpoints"))


def read_description(
    content: Mapping[str, Any], origin: str, folders: list[Path], *, inside: bool = False
) -> Description:
    """What a description says. Relative files lie in its `base_dir`, else in the first of `folders` that has them.

    inside: it was found in a folder and not written by the user, so that its files must lie there.
    Raises ConfigError with everything that is wrong with it.
    """
    problems = [*_unknown(content), *_mistyped(content)]
    if problems:
        raise ConfigError(together(f"the description in {origin}", problems))
    given = {k: v for k, v in content.items() if v is not None}
    kind = str(given["type"]).lower()
    files = given["checkpoints"]
    names = {"tp": files} if not isinstance(files, dict) else dict(files)
    listed = [*names.get("non_tp", ()), *(names["tp"] if not isinstance(names["tp"], str) else [names["tp"]])]
    root = _root(listed, given.get("base_dir"), folders)
    if outside := [n for n in listed if inside and not (root / n).resolve().is_relative_to(folders[0].resolve())]:
        raise ConfigError(f"the description in {origin} names files outside its folder: {', '.join(outside)}")
    split = given.get("parallelization") == "tp"
    paths = (root / names["tp"],) if isinstance(names["tp"], str) else tuple(root / n for n in names["tp"])
    ranks, stages = _sizes(given, kind, len(paths), origin)
    return Description(
        origin,
        kind,
        given.get("version"),
        paths,
        tuple(root / n for n in names.get("non_tp", ())),
        split,
        ranks,
        stages,
        given.get("module_key"),
        given.get("splits"),
    )


def _unknown(content: Mapping[Any, Any]) -> list[str]:
    problems = []
    for name in content.keys() - KEYS.keys():
        near = get_close_matches(str(name), KEYS, n=1)
        problems.append(
            f"unknown key {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(KEYS)}")
        )
    problems += [f"{name!r} is missing" for name in ("type", "checkpoints") if content.get(name) is None]
    return problems


def _mistyped(content: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, value in content.items():
        if name not in KEYS or value is None:
            continue
        if not isinstance(value, KEYS[name]) or isinstance(value, bool):
            problems.append(f"{name}={value!r:.60} must be {' or '.join(t.__name__ for t in KEYS[name])}")
        elif name.endswith("_size") and value < 1:
            problems.append(f"{name}={value} must be at least 1")
    kind, how = content.get("type"), content.get("parallelization")
    if isinstance(kind, str) and kind.lower() not in TYPES:
        problems.append(f"type={kind!r} is not one of 'Megatron', 'ds_model', 'bloom'")
    if how not in (None, "tp", "pp"):
        problems.append(f"parallelization={how!r} is not 'tp' or 'pp'")
    return problems + _misnamed(content.get("checkpoints"), how)


def _misnamed(files: Any, how: Any) -> list[str]:
    """What is wrong with the names of files."""
    if isinstance(files, dict):
        if how != "tp" or not files.keys() <= {"tp", "non_tp"} or "tp" not in files:
            return ['checkpoints={"tp": [...], "non_tp": [...]} has these two keys, and goes with parallelization="tp"']
        lists = list(files.values())
    else:
        lists = [files] if isinstance(files, (list, tuple)) else []
    if any(not isinstance(names, (list, tuple)) or not all(n and isinstance(n, str) for n in names) for names in lists):
        return [f"checkpoints={files!r:.60} must list names of files"]
    return ["checkpoints lists no files"] if files in ([], ()) else []


def _root(names: list[str], base: str | None, folders: list[Path]) -> Path:
    roots = [*([Path(base).expanduser()] if base else []), *folders]
    return next((r for r in roots if names and (r / names[0]).exists()), roots[0])


def _sizes(given: Mapping[str, Any], kind: str, files: int, origin: str) -> tuple[int, int]:
    """Over how many ranks tensors are split, and how many files each has; `mp_size` goes before `tp_size`."""
    said, stages = given.get("mp_size", given.get("tp_size")), given.get("pp_size")
    if kind == "megatron":
        if said is None and stages is None:
            return files, 1
        return said or max(1, files // (stages or 1)), stages or max(1, files // (said or 1))
    if given.get("parallelization") != "tp":
        return 1, files
    ranks = said or files
    if files % ranks:
        raise ConfigError(f"the description in {origin} lists {files} files, no multiple of tp_size={ranks}")
    return ranks, files // ranks
