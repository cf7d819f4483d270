"""From a live model to its backbones, found, described and checked; nothing is changed yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hasten.errors import UnsupportedModel, WeightError
from hasten.families import FAMILIES
from hasten.families.family import Family, Seam
from hasten.inject.backbone import Backbone
from hasten.inject.loan import live_tensors
from hasten.spec import Tokens, Tower
from hasten.weights import Binding, resolve

ADVICE = (
    "Three things would work: an injection_policy that says which of the types that `hasten models` lists your class "
    "follows ({YourLayer: a policy of hasten.module_inject.replace_policy}); mp_size=N in N processes, which divides "
    "its linears, by the names in an injection_policy ({YourLayer: the linears to sum behind}), by transformers' "
    "tp_plan or by a trace, whatever is there first; or replace_with_kernel_inject=False, which serves the model as it "
    "is"
)


class NoFamily(UnsupportedModel):
    """No family has the model's type. why: so, without the advice."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}. {ADVICE}")
        self.why = why


def attach(model: nn.Module, family: str | None = None) -> list[Backbone]:
    """A backbone per tower that the model has, ready to be installed.

    Raises UnsupportedModel, ConfigError or WeightError, each with everything that is wrong.
    """
    kind = family or getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise NoFamily(_undescribed(model, kind))
    found, tensors = FAMILIES[kind], live_tensors(model)
    config = found.read(model)
    towers = found.describe(config)
    config.finish()
    backbones = [b for name, t in towers.items() if (b := _backbone(model, found, name, t, tensors)) is not None]
    if not backbones:
        raise UnsupportedModel(f"{type(model).__name__} holds none of the backbones of {kind}: {_paths(found)}")
    return backbones


def _backbone(
    model: nn.Module, family: Family, name: str, tower: Tower, tensors: Mapping[str, Tensor]
) -> Backbone | None:
    seam = family.seams[name]
    module = _find(model, seam)
    if module is None:
        return None
    if any(c.__name__ == "BackboneMixin" for c in type(module).__mro__):  # it moves between transformers' versions
        raise UnsupportedModel(
            f"{type(module).__name__} answers with the feature maps of single blocks, which no fused backbone gives: "
            "use a model with a task head, or replace_with_kernel_inject=False"
        )
    path = next(n for n, m in model.named_modules() if m is module)
    prefix = f"{path}." if path else ""
    tower = _with_live_head(model, tower, family, name, tensors, prefix)
    bindings = resolve(tower, family.dialects[name], tensors, prefix)
    _unclaimed(bindings, seam, module, prefix)
    return Backbone(model, module, seam, tower, bindings)


def _find(model: nn.Module, seam: Seam) -> nn.Module | None:
    base = getattr(model, "base_model", model)
    for path in seam.path:
        module: nn.Module | None = base
        for part in path.split(".") if path else ():
            module = getattr(module, part, None)
            if module is None:
                break
        if module is not None:
            return module
    return None


def _with_live_head(
    model: nn.Module, t: Tower, family: Family, name: str, tensors: Mapping[str, Tensor], prefix: str
) -> Tower:
    """The tower without its head where the model has none, and with it tied or not as the live tensors are."""
    if t.head is None or not isinstance(t.embed, Tokens):
        return t
    find: Any = getattr(model, "get_output_embeddings", None)
    output = None if find is None else find()
    heads = {str(d.slots.get("head", "")).lstrip("/") for d in family.dialects[name]}
    present = next((h for h in heads if f"{h}.weight" in tensors), None)
    if output is None or present is None:
        return replace(t, head=None)
    tables = {prefix + str(d.slots["tokens"]).lstrip("/") for d in family.dialects[name]}
    table = next((tensors[f"{n}.weight"] for n in tables if f"{n}.weight" in tensors), None)
    own = tensors[f"{present}.weight"]
    tied = table is own or (table is not None and not own.is_meta and table.data_ptr() == own.data_ptr())
    return replace(t, head=replace(t.head, tied=tied, bias=f"{present}.bias" in tensors))


def _unclaimed(bindings: Sequence[Binding], seam: Seam, module: nn.Module, prefix: str) -> None:
    """WeightError naming every parameter of the backbone that the description does not account for."""
    claimed = {k for b in bindings for k in b.keys}
    own = [prefix + n for n, _ in module.named_parameters(remove_duplicate=False) if not seam.kept(n)]
    left = sorted(set(own) - claimed)
    if left:
        shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
        raise WeightError(f"{type(module).__name__} has parameters that its family does not know: {shown}")


def _paths(family: Family) -> str:
    return ", ".join(" or ".join(p or "the base model" for p in s.path) for s in family.seams.values())


def _undescribed(model: nn.Module, kind: str | None) -> str:
    what = f"model type {kind!r}" if kind else f"{type(model).__name__}, which has no transformers config"
    return f"no family describes {what}"
