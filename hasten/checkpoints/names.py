"""Which tensors of a checkpoint make which of a model, by transformers' own rules.

Releases name and pack parameters differently (gamma and weight, experts one by one and stacked). What transformers does
about that is asked of it and not repeated here: `conversion_mapping` since release 5, methods of the model before.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from hasten.weights import Binding

Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Target:
    """Stored tensors that belong together, and `make`: from a way to read them to the model's tensors by name.

    `make` takes tensors on the meta device too, and so tells names and shapes without reading. binding: the canonical
    parameter that the sources hold, where they are in a dialect of their own.
    """

    sources: tuple[str, ...]
    make: Callable[[Read], dict[str, Tensor]]
    binding: Binding | None = None


@dataclass(frozen=True, slots=True)
class Names:
    """`targets` make tensors of the model; `unexpected` are stored names with no place in it.

    `heads` have none either, and need none: the model is a base model, and the checkpoint holds heads upon it.
    `problems` are what else is wrong, and `claimed` the model's names that are not missing, whatever comes of them.
    """

    targets: tuple[Target, ...]
    unexpected: tuple[str, ...]
    heads: tuple[str, ...]
    problems: tuple[str, ...] = ()
    claimed: frozenset[str] = frozenset()


def match(model: nn.Module, stored: Iterable[str], expected: Container[str]) -> Names:
    """Find the place of each stored name among `expected`, the names of the model's tensors."""
    rename, converters = _rules(model)
    prefix = _prefix(model)
    pieces: dict[str, list[tuple[str, str]]] = {}  # model's name -> stored names, and the pattern that each matched
    singles: dict[str, str] = {}
    left: list[str] = []
    stripped = False
    for name in sorted(stored, key=_natural):
        new, pattern = rename(name)
        place = _place(new, prefix, expected)
        if place is None and (place := _place(name, prefix, expected)) is not None:
            new, pattern = name, None  # a rule matched a name that was right as it stood
        if place is None:
            left.append(name)
            continue
        stripped |= len(prefix) > 1 and new.startswith(prefix) and place != new
        if pattern is None and place not in singles:
            singles[place] = name
        elif pattern is None:
            left.append(name)
        else:
            pieces.setdefault(place, []).append((name, pattern))
    targets = [Target((name,), partial(_single, place, name)) for place, name in singles.items()]
    for place, parts in pieces.items():
        convert = partial(_convert, model, converters[parts[0][1]], place, parts)
        targets.append(Target(tuple(n for n, _ in parts), convert))
    heads = [n for n in left if stripped and not n.startswith(prefix)]
    ignored = _ignored(model, prefix)
    unexpected = [n for n in left if n not in heads and not ignored(n)]
    return Names(tuple(targets), tuple(unexpected), tuple(heads))


def may_be_missing(model: nn.Module) -> Callable[[str], bool]:
    """Whether transformers' class says of a name that checkpoints may lack it."""
    return _any(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def _ignored(model: nn.Module, prefix: str) -> Callable[[str], bool]:
    """Whether a stored name may be left out: by the class, or because it is a buffer that the model computes."""
    listed = _any(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    computed = {f"{path}.{n}".lstrip(".") for path, m in model.named_modules() for n in m._non_persistent_buffers_set}
    # these were kept in every layer by old releases
    moved = _any(rf"(^|\.){n}$" for n in ("inv_freq", "position_ids") if any(c.endswith(n) for c in computed))
    return lambda name: listed(name) or moved(name) or _place(name, prefix, computed) is not None


def _any(patterns: Iterable[str]) -> Callable[[str], bool]:
    compiled = [re.compile(p) for p in patterns]
    return lambda name: any(p.search(name) for p in compiled)


def place_of(model: nn.Module, name: str, expected: Container[str]) -> str | None:
    """The name among `expected` that a stored one means, without rules of conversion; None if there is none."""
    return _place(name, _prefix(model), expected)


def _prefix(model: nn.Module) -> str:
    return f"{getattr(model, 'base_model_prefix', '')}."


def _place(name: str, prefix: str, expected: Container[str]) -> str | None:
    """The name among `expected` that is meant, with the base model's prefix put before it or taken off."""
    return next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in expected), None)


def _single(place: str, name: str, read: Read) -> dict[str, Tensor]:
    return {place: read(name)}


def _convert(model: Any, rule: Any, place: str, parts: list[tuple[str, str]], read: Read) -> dict[str, Tensor]:
    rule = copy.deepcopy(rule)
    for name, pattern in parts:
        rule.add_tensor(place, name, pattern, partial(read, name))
    made = rule.convert(place, model=model, config=model.config)
    return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}


def _rules(model: Any) -> tuple[Callable[[str], tuple[str, str | None]], dict[str, Any]]:
    """How a stored name becomes the model's, with the pattern of a converter that is needed; converters by pattern."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return lambda name: (name, None), {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return partial(_rename_by_methods, model), {}
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    return lambda name: rename_source_key(name, renamings, converters), by_pattern


def _rename_by_methods(model: Any, name: str) -> tuple[str, None]:
    """What transformers 4 does."""
    name, _ = model._fix_state_dict_key_on_load(name)
    for pattern, replacement in (model._checkpoint_conversion_mapping or {}).items():
        name, replaced = re.subn(pattern, replacement, name)
        if replaced:
            break
    return name, None


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layers.10 behind layers.9: experts are stacked in the order of their numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
