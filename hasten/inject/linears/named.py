"""Plans from the names that a user gives: which linears of a layer class are summed behind."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hasten.inject.linears.draft import Draft
from hasten.inject.linears.matrices import inputs, layout, outputs


def named(model: nn.Module, names: Mapping[type[nn.Module], tuple[str, ...]], size: int) -> Draft:
    """In every layer of the classes, the linears named take a rank's features, and all others give them."""
    draft = Draft(model, "the names in injection_policy", size)
    for layer, suffixes in names.items():
        for path, module in draft.modules.items():
            if isinstance(module, layer):
                _layer(draft, path, module, suffixes)
    return draft


def _layer(draft: Draft, path: str, layer: nn.Module, suffixes: tuple[str, ...]) -> None:
    inner = {n: m for n, m in layer.named_modules() if n}
    rows = [n for n in inner if any(f".{n}".endswith(f".{s}") for s in suffixes)]
    prefix = f"{path}." if path else ""
    for n in rows:
        draft.rows(prefix + n)
    widths = {inputs(inner[n]) for n in rows if layout(inner[n])}
    for n, m in inner.items():
        if n not in rows and layout(m) is not None:
            draft.columns(prefix + n)
            draft.packed[prefix + n] = next((k for k in (2, 3) if any(outputs(m) == k * w for w in widths)), 1)
