"""What a model on the meta device lacks and no checkpoint holds: buffers that its modules compute when they are made.

Rotary frequencies, position ids and causal masks are computed by constructors. So the model is made once more from its
config, its parameters on the meta device, where they take no memory, and its buffers with values.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from hasten.errors import WeightError

DRAWS = (Tensor.uniform_, Tensor.normal_)


def rebuild(model: nn.Module, needed: Collection[str]) -> dict[str, Tensor]:
    """Values on the CPU for tensors of the model, by name: buffers, parameters and plain attributes of its modules.

    Parameters get the values that transformers' `_init_weights` gives them.
    Raises WeightError where the model cannot be made from its config, or comes out different.
    """
    names = ", ".join(sorted(needed))
    try:
        again = _again(model)
    except Exception as e:
        raise WeightError(
            f"{type(model).__name__}({type(getattr(model, 'config', None)).__name__}) does not give the values of "
            f"{names}, which are on the meta device and in no checkpoint: {type(e).__name__}: {e}"
        ) from e
    values: dict[str, Tensor] = {}
    for name in needed:
        want, value = _at(model, name), _at(again, name)
        if isinstance(value, nn.Parameter):
            value = _initial(again, name)
        if value is None or value.is_meta or value.shape != want.shape:
            raise WeightError(
                f"{name} is on the meta device and in no checkpoint, and {type(model).__name__}(config) has no such one"
            )
        values[name] = value.detach().to(want.dtype)
    return values


def _again(model: Any) -> nn.Module:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    before = torch.get_default_dtype()
    hook = register_module_parameter_registration_hook(_on_meta)  # pyright: ignore[reportArgumentType]
    try:
        torch.set_default_dtype(dtype)
        with torch.device("cpu"), _Undrawn(), torch.no_grad():
            return type(model)(copy.deepcopy(model.config))
    finally:
        torch.set_default_dtype(before)
        hook.remove()


class _Undrawn(TorchFunctionMode):
    """Constructors draw values for parameters on the meta device too, which takes most of their time, for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        t = args[0] if args else kwargs.get("tensor")
        draws = getattr(func, "__module__", None) == torch.nn.init.__name__ or func in DRAWS
        return t if draws and isinstance(t, Tensor) and t.is_meta else func(*args, **kwargs)


def _on_meta(module: nn.Module, name: str, p: Tensor | None) -> nn.Parameter | None:
    return None if p is None or p.is_meta else nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)


def _at(model: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    try:
        return getattr(model.get_submodule(path), last)
    except AttributeError:
        return None


@torch.no_grad()
def _initial(again: Any, name: str) -> Tensor:
    """A parameter as transformers initialises it; all others stay on the meta device, where that does nothing."""
    path, _, last = name.rpartition(".")
    module, owners = again.get_submodule(path), [again]
    for part in path.split(".") if path else ():
        owners.append(owners[-1].get_submodule(part))
    module._parameters[last] = nn.Parameter(torch.empty_like(module._parameters[last], device="cpu"))
    next(m for m in reversed(owners) if hasattr(m, "_init_weights"))._init_weights(module)
    return module._parameters[last]
