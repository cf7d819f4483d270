"""What `injection_policy` may say about a model, and what it comes to: the name of a family.

DeepSpeed-Inference describes a layer by a policy class that knows how to reach into it, and users pass
`injection_policy={LayerClass: PolicyClass}`. In Hasten a family describes a whole architecture, so a policy only names
one. The other form, `{LayerClass: ("attention.output.dense", "output.dense")}`, names the linears whose outputs tensor
parallelism sums; it changes nothing on one device.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import ClassVar

from torch import nn

from hasten.errors import ConfigError, UnsupportedModel


class DSPolicy:
    """The root of all policies. `refusal` says why models of this policy are not accelerated, where they are not."""

    layer: ClassVar[str] = ""
    refusal: ClassVar[str] = ""

    @classmethod
    def check(cls) -> str:
        """What the policy asks for that is not supported, in one sentence; empty when all is well."""
        return cls.refusal


class TransformerPolicy(DSPolicy):
    """A transformer layer.

    family: the name of the architecture, as `hasten models` lists it.
    layer: the name of the layer class that the policy was made for; informative.
    kin: other families that the policy stands for when the model's own config names one of them.
    """

    family: ClassVar[str] = ""
    kin: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def named(cls) -> str:
        """The family that the policy and its settings come to."""
        return cls.family


Policies = Mapping[type[nn.Module], "type[DSPolicy] | tuple[str, ...]"]
"""`injection_policy` in its normal form: a policy class or the names of row-parallel linears for each layer class."""


def read_policies(value: object) -> Policies:
    """The normal form of an `injection_policy`; one name becomes a tuple. ValueError says what is expected."""
    expected = "a dict of {layer class: policy class, or names of row-parallel linears}"
    if not isinstance(value, Mapping):
        raise ValueError(expected)
    problems, policies = [], {}
    for layer, policy in value.items():
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            problems.append(f"the key {layer!r} is not a subclass of torch.nn.Module")
        names = (policy,) if isinstance(policy, str) else policy
        if isinstance(names, (tuple, list)) and names and all(isinstance(name, str) and name for name in names):
            policies[layer] = tuple(name.removeprefix(".") for name in names)
        elif isinstance(policy, type) and issubclass(policy, DSPolicy):
            policies[layer] = policy
        else:
            problems.append(
                f"{policy!r} is neither a policy class of hasten.module_inject.replace_policy (or a subclass of its "
                "TransformerPolicy) nor names of linears"
            )
    if problems:
        raise ValueError(f"{expected}; " + "; ".join(problems))
    return policies


def validate_policy(model: nn.Module, policy: Policies) -> None:
    """Checks that every layer class of `policy` is in `model` and every name in one of its layers; ConfigError if not.

    A name fits a linear whose path inside the layer is the name or ends in "." and the name.
    """
    problems = []
    for layer, value in policy.items():
        found = [module for module in model.modules() if isinstance(module, layer)]
        if not found:
            problems.append(f"{layer.__name__} is not in {type(model).__name__}, whose layers are {_layers(model)}")
            continue
        if isinstance(value, tuple):
            linears = list(dict.fromkeys(path for module in found for path in _linears(module)))
            problems += [
                f"{name!r} is no linear of {layer.__name__}, whose linears are {', '.join(linears) or 'none'}"
                for name in value
                if not any(f".{path}".endswith(f".{name}") for path in linears)
            ]
    if problems:
        raise ConfigError("injection_policy does not fit the model: " + "; ".join(problems))


def resolve_policy(model: nn.Module, policy: Policies | None, known: Collection[str] = ()) -> str | None:
    """The family that `policy` names for `model`; None where it names none (no policy, or only names of linears).

    `known` lists the families there are; where the model's own config names one of them, the policy must agree.
    Raises ConfigError for a policy that does not fit, UnsupportedModel for one whose models are not accelerated.
    """
    if not policy:
        return None
    policies = [value for value in policy.values() if isinstance(value, type)]
    if refusals := [f"{value.__name__}: {refusal}" for value in policies if (refusal := value.check())]:
        raise UnsupportedModel("; ".join(dict.fromkeys(refusals)))
    validate_policy(model, policy)
    families = {_family(model, value, known) for value in policies}
    if len(families) > 1:
        raise ConfigError(f"injection_policy names several families for one model: {', '.join(sorted(families))}")
    return next(iter(families), None)


def _family(model: nn.Module, policy: type[DSPolicy], known: Collection[str]) -> str:
    family = policy.named() if issubclass(policy, TransformerPolicy) else getattr(policy, "family", "")
    if not isinstance(family, str) or not family or (known and family not in known):
        near = difflib.get_close_matches(str(family), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; `hasten models` lists the families"
        raise ConfigError(f"{policy.__name__}.family={family!r} is not a family{hint}")
    own = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(own, str) and own in (family, *getattr(policy, "kin", ())):
        return own
    if own in known:
        raise ConfigError(
            f"injection_policy says {family} ({policy.__name__}), but the model's config says {own}; "
            "leave injection_policy out: the model needs none"
        )
    return family


def _layers(model: nn.Module) -> str:
    """The names of the repeated classes of `model` (members of its module lists), or of all its classes."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = {type(child).__name__ for modules in lists for child in modules}
    return ", ".join(sorted(layers or {type(module).__name__ for module in model.modules()}))


def _linears(layer: nn.Module) -> list[str]:
    """The paths of the matrices of `layer` that multiply: linears and transformers' Conv1D, not embeddings."""
    return [
        path
        for path, module in layer.named_modules()
        if path and not isinstance(module, nn.Embedding) and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
