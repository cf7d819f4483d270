"""The arguments of `init_inference`, parsed: from whatever the user wrote to one frozen value.

Settings come from a config (a dict, or a JSON file) and from keyword arguments, under names of DeepSpeed-Inference or
Hasten's own (`hasten.inject.keys`). Everything that is wrong with them is reported in one ConfigError.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import torch

from hasten.errors import ConfigError
from hasten.inject.keys import ELSEWHERE, KEYS, SECTIONS, Key
from hasten.inject.kinds import FLAG, SECTION, pipeline_size, shown, world_size
from hasten.inject.policy import Policies

_KEY = {key.name: key for key in KEYS}


INSIDE = {f"tensor_parallel.{n}": n for n in ("tp_size", "mpu", "tp_group")} | {"moe.ep_size": "ep_size"}
INSIDE |= {f"pipeline_parallel.{n}": n for n in ("pp_size", "pp_group", "layers")}
"""Keys of sections that have a field of their own."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `init_inference` works from; the fields carry the names of their keys, whose table says what they mean."""

    replace_with_kernel_inject: bool = True
    dtype: torch.dtype | None = None
    injection_policy: Policies | None = None
    max_out_tokens: int | None = None
    min_out_tokens: int = 1
    enable_cuda_graph: bool | None = None
    keep_module_on_host: bool = False
    triangular_masking: bool | None = None
    certify: bool | Mapping[str, Any] = False
    keep_originals: bool = False
    merge_adapters: bool = False
    skip_padding: bool = False
    batch_invariant: bool = False
    device: torch.device | None = None
    backend: str | None = None
    checkpoint: Any = None
    base_dir: str = ""
    tp_size: int = 1
    mpu: Any = None
    tp_group: Any = None
    ep_size: int = 1
    pp_size: int = 1
    pp_group: Any = None
    layers: tuple[int, ...] | None = None
    save_mp_checkpoint_path: str | None = None
    notes: tuple[str, ...] = ()
    """One sentence for each key that was given and needs nothing done, for explain()."""

    @classmethod
    def parse(cls, config: str | os.PathLike[str] | Mapping[str, Any] | None = None, **keywords: Any) -> Options:
        """The options that `config` (a dict, or the path of a JSON file) and `keywords` give together.

        A key may appear in both, or under two of its names, if the values are equal. None means "not given".
        The config is not changed. Raises ConfigError with every problem there is.
        """
        problems: list[str] = []
        given = [*_from_config(config, problems), *_read(keywords, "", "keyword argument", problems)]
        settings = _merge(given, problems)
        for setting in given:
            problems += _refusals(setting)
        problems += [*_quantization(settings), *_contradictions(settings), *_division(settings)]
        if problems:
            raise ConfigError(_together(list(dict.fromkeys(problems))))
        names = {field.name for field in fields(cls)}
        values = {INSIDE.get(path, path): setting.value for path, setting in settings.items()}
        values = {name: value for name, value in values.items() if name in names}
        needless = [setting for setting in given if setting.key.disposition == "needless"]
        notes = dict.fromkeys(f"{setting.path}={shown(setting.value)}: {setting.key.says}" for setting in needless)
        return cls(**values, notes=tuple(notes))

    def check_masking(self, causal: bool) -> None:
        """Raises ConfigError if the user asked for bidirectional attention and the model's is `causal`."""
        if causal and self.triangular_masking is False:
            raise ConfigError(
                "triangular_masking=False asks for bidirectional attention, but this model's is causal; "
                "leave the key out: the architecture says how it masks"
            )


@dataclass(frozen=True, slots=True)
class Setting:
    """A key with the value given for it in normal form; `path` and `written` as the user put them."""

    key: Key
    value: Any
    path: str
    written: Any
    origin: str

    def __str__(self) -> str:
        return f"{self.path}={shown(self.written)} ({self.origin})"

    @property
    def target(self) -> str:
        """The name of the key that the value counts for."""
        return self.key.moved or self.key.name


def _from_config(config: object, problems: list[str]) -> Iterator[Setting]:
    match config:
        case None:
            return
        case Mapping():
            yield from _read(config, "", "config dict", problems)
        case str() | os.PathLike():
            origin = f"config file {os.fspath(config)!r}"
            yield from _read(_load(config, origin, problems), "", origin, problems)
        case _:
            problems.append(f"config must be a dict, the path of a JSON file or None, not {shown(config)}")


def _load(path: str | os.PathLike[str], origin: str, problems: list[str]) -> Mapping[str, Any]:
    """The object in a JSON file; an empty one, and a problem, if there is none."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        problems.extend(
            f"{origin}: key {name!r} appears {names.count(name)} times in one object"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        )
        return dict(pairs)

    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_pairs_hook=unique)
    except OSError as error:
        problems.append(f"{origin} cannot be read: {error.strerror or error}")
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        problems.append(f"{origin} is not JSON: {error}")
    else:
        if isinstance(content, dict):
            return content
        problems.append(f"{origin} must hold a JSON object, not {shown(content)}")
    return {}


def _read(source: Mapping[Any, Any], section: str, origin: str, problems: list[str]) -> Iterator[Setting]:
    """The settings of one mapping, with those of the sections inside it; `section` is where the mapping sits."""
    for name, written in source.items():
        path = f"{section}.{name}" if section else str(name)
        key = SECTIONS[section].get(name) if isinstance(name, str) else None
        if key is None:
            problems.append(f"unknown key {path!r} ({origin}); {_hint(name, section)}")
            continue
        if written is None:
            continue
        try:
            value = {key.shorthand: written} if _is_shorthand(key, written) else key.kind.read(written)
        except ValueError as error:
            problems.append(f"{path}={shown(written)} ({origin}): expected {error}")
            continue
        if key.kind is SECTION:
            yield from _read(value, key.name, origin, problems)
        else:
            yield Setting(key, value, path, written, origin)


def _is_shorthand(key: Key, written: object) -> bool:
    """Whether a section is written as the bare value of its key; numbers stand for counts, True and False for flags."""
    if key.shorthand is None:
        return False
    kind = SECTIONS[key.name][key.shorthand].kind
    return isinstance(written, bool) if kind is FLAG else isinstance(written, int) and not isinstance(written, bool)


def _hint(name: object, section: str) -> str:
    """What an unknown name probably meant."""
    if not section and name in ELSEWHERE:
        return ELSEWHERE[str(name)]
    known = SECTIONS[section]
    elsewhere = {spelling: key.name for keys in SECTIONS.values() for spelling, key in keys.items()}
    if isinstance(name, str) and name in elsewhere:
        return f"did you mean {elsewhere[name]!r}?"
    if near := get_close_matches(str(name), known, n=1):
        return f"did you mean {near[0]!r}?"
    return f"known here: {', '.join(known)}"


def _merge(given: list[Setting], problems: list[str]) -> dict[str, Setting]:
    """The settings by the name of the key they count for; those that disagree are problems."""
    merged: dict[str, Setting] = {}
    for setting in given:
        first = merged.setdefault(setting.target, setting)
        if not _same(first.value, setting.value):
            problems.append(f"Conflicting argument {setting.target!r}: {first} and {setting}")
    return merged


def _same(first: object, second: object) -> bool:
    """Whether two values are equal; values that cannot be compared as a whole (arrays) are equal only to themselves."""
    try:
        return first is second or bool(first == second)
    except (ValueError, RuntimeError):
        return False


def _refusals(setting: Setting) -> Iterator[str]:
    """Why a value that is valid is not supported, if it is not."""
    key = _KEY[setting.target]
    if key.permits is not None and not any(_same(setting.value, value) for value in key.permits):
        accepts = f" (it accepts {', '.join(map(repr, key.permits))})" if key.permits else ""
        yield f"{setting} is not supported by this version{accepts}: {key.instead or key.says}"


def _quantization(settings: dict[str, Setting]) -> Iterator[str]:
    """Settings of `quant` ask for quantization unless `quant`, or their part of it, is switched off."""

    def off(path: str) -> bool:
        switch = settings.get(f"{path}.enabled")
        return switch is not None and switch.value is False

    if off("quant"):
        return
    for path, setting in settings.items():
        part = ".".join(path.split(".")[:2])
        if path.startswith("quant.") and path != "quant.enabled" and not off(part):
            yield f"{setting} asks for quantization, which this version does not support: {_KEY['quant'].says}"


def _contradictions(settings: dict[str, Setting]) -> Iterator[str]:
    """Settings that are fine alone and not together."""
    low, high = settings.get("min_out_tokens"), settings.get("max_out_tokens")
    if low and high and low.value > high.value:
        yield f"{low} exceeds {high}: the minimum must be at most the maximum"
    host, device = settings.get("keep_module_on_host"), settings.get("device")
    if host and host.value and device and device.value.type != "cpu":
        yield f"{host} contradicts {device}: leave one of them out"
    fuse, policy = settings.get("replace_with_kernel_inject"), settings.get("injection_policy")
    classes = [value.__name__ for value in policy.value.values() if isinstance(value, type)] if policy else []
    if fuse and not fuse.value and classes:
        yield f"{fuse} forbids what injection_policy ({', '.join(classes)}) asks for: leave one of them out"
    invariant, backend = settings.get("batch_invariant"), settings.get("backend")
    if invariant and invariant.value:
        if backend:
            yield f"{invariant} chooses the kernels itself, which contradicts {backend}: leave one of them out"
        if fuse and not fuse.value:
            yield f"{invariant} needs the fused backbone, which {fuse} forbids: leave one of them out"


def _division(settings: dict[str, Setting]) -> Iterator[str]:
    """Settings that disagree about how many processes hold the model, or that do not go with several of them."""
    sizes = dict[str, int]()
    mpu = "tensor_parallel.mpu"
    ways: dict[str, dict[str, Callable[[Any], int]]] = {
        "tensor_parallel": {"tensor_parallel.tp_size": int, mpu: world_size, "tensor_parallel.tp_group": world_size},
        "pipeline_parallel": {
            "pipeline_parallel.pp_size": int,
            mpu: pipeline_size,
            "pipeline_parallel.pp_group": world_size,
        },
    }
    for part, sources in ways.items():
        counted = [(s, read(s.value)) for path, read in sources.items() if (s := settings.get(path)) is not None]
        if len({n for s, n in counted if part in s.target or n > 1}) > 1:
            told = " and ".join(f"{s.path} has {n} ({s.origin})" for s, n in counted)
            yield f"different numbers of processes: {told}"
        sizes[part] = max((n for _, n in counted), default=1)
    yield from _stages(settings, sizes["pipeline_parallel"])
    experts, over = settings.get("moe.ep_size"), sizes["tensor_parallel"]
    if experts and experts.value not in (1, over):
        yield f"{experts} must be 1 or the number of processes that hold the model together (mp_size), which is {over}"
    invariant, fuse = settings.get("batch_invariant"), settings.get("replace_with_kernel_inject")
    if over > 1 and invariant and invariant.value:
        yield f"{invariant} cannot be kept among {over} processes, whose sums it does not order: leave one of them out"
    if sizes["pipeline_parallel"] > 1 and fuse and not fuse.value:
        most = over * sizes["pipeline_parallel"]
        yield f"{fuse} leaves out what is divided among {most} processes, the fused backbone: leave one of them out"


def _stages(settings: dict[str, Setting], stages: int) -> Iterator[str]:
    layers = settings.get("pipeline_parallel.layers")
    if layers and len(layers.value) != stages:
        yield f"{layers} counts the layers of {len(layers.value)} stages, and pp_size is {stages}"


def _together(problems: list[str]) -> str:
    if len(problems) == 1:
        return f"init_inference: {problems[0]}"
    return "".join([f"init_inference: {len(problems)} problems", *(f"\n  - {problem}" for problem in problems)])
