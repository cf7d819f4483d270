"""Plans from transformers' own: the `tp_plan` of a model's class and config, in the spellings of its releases."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from hasten.inject.linears.draft import Draft

SOURCE = "transformers' tp_plan"

Step = Callable[[Draft, str], None]

MODULES: dict[str, Step] = {
    "colwise": lambda d, path: d.columns(path),
    "local_colwise": lambda d, path: d.columns(path),
    "packed_colwise": lambda d, path: d.columns(path, parts=2),
    "colwise_gather_output": lambda d, path: d.columns(path, gathered=True),
    "colwise_rep": lambda d, path: d.columns(path, gathered=True),
    "rowwise": lambda d, path: d.rows(path),
    "local_rowwise": lambda d, path: d.rows(path, None),
    "rowwise_split_input": lambda d, path: d.rows(path, "rows of whole"),
    "rowwise_rep": lambda d, path: d.rows(path, "rows of whole"),
    "moe_tp_experts": lambda d, path: d.seam(path, "sum"),
    "all_reduce": lambda d, path: d.seam(path, "sum"),
    "gather": lambda d, path: d.seam(path, "sum"),
}
"""What a style says of a module."""

TENSORS: dict[str, Step] = {
    "colwise": lambda d, name: d.tensor(name, _columns(d, name)),
    "local_colwise": lambda d, name: d.tensor(name, _columns(d, name)),
    "packed_colwise": lambda d, name: d.tensor(name, _columns(d, name), parts=2),
    "rowwise": lambda d, name: _of_inputs(d, name, 1),
    "local_rowwise": lambda d, name: _of_inputs(d, name, 1),
    "packed_rowwise": lambda d, name: _of_inputs(d, name, 2),
    "local_packed_rowwise": lambda d, name: _of_inputs(d, name, 2),
}
"""What a style says of a parameter that its module uses by itself, such as the matrices of experts."""

WHOLE = {"replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local", "local_params"}
WHOLE |= {"embedding_rowwise", "embedding_colwise"}
"""Styles that divide nothing, or tables of tokens, which are whole on every rank."""


def declared(model: nn.Module, size: int) -> Draft | None:
    """What transformers declares of a model; None where it divides nothing but what is put together at once."""
    plan = _declared(model)
    draft = Draft(model, SOURCE, size)
    refused: dict[str, list[str]] = {}
    for pattern, style in plan.items():
        for name, steps in _matches(draft, pattern):
            if style in steps:
                steps[style](draft, name)
            elif style not in WHOLE:
                refused.setdefault(style, []).append(name)
    draft.problems += [f"style {style!r} of {names[0]} is not known" for style, names in refused.items()]
    made = draft.plan()
    gathered = {s.path for s in made.seams if s.kind == "gather"}
    inside = any(c.name.rpartition(".")[0] not in gathered for c in made.cuts)
    return draft if inside or draft.problems else None


def _declared(model: nn.Module) -> Mapping[str, str]:
    """The model's whole plan, under its own names; the base model's own where no class around it has gathered them."""
    plan: Any = getattr(model, "_tp_plan", None)
    if isinstance(plan, Mapping) and plan:
        return plan
    plan = getattr(getattr(model, "config", None), "base_model_tp_plan", None)
    return plan if isinstance(plan, Mapping) else {}


def _matches(draft: Draft, pattern: str) -> Iterator[tuple[str, Mapping[str, Step]]]:
    fits = re.compile(re.escape(pattern).replace(r"\*", r"\d+")).fullmatch
    yield from ((path, MODULES) for path in draft.modules if fits(path))
    yield from ((name, TENSORS) for name in draft.parameters if fits(name))


def _columns(draft: Draft, name: str) -> int:
    return max(draft.parameters[name].ndim - 2, 0)


def _of_inputs(draft: Draft, name: str, parts: int) -> None:
    if draft.parameters[name].ndim > 1:  # a bias behind the product is whole
        draft.tensor(name, -1, parts)
