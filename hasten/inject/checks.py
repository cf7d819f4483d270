"""What has to hold of a model before anything about it is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hasten.errors import ConfigError, UnsupportedModel, WeightError
from hasten.inject.loan import live_tensors

WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule", "PipelineModule")
"""Classes around a model that would not see a replaced forward."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_model(model: object) -> nn.Module:
    """The model, if it is one that can be taken over at all."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    name = type(model).__name__
    if name == "InferenceEngine" or any("_hasten" in vars(m) for m in model.modules()):
        raise ConfigError(f"{name} is under Hasten already: call revert() of its engine first")
    if name in WRAPPERS or isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModel(f"{name} wraps or compiles the model: pass the plain module inside it")
    return model


def check_weights(model: nn.Module, shares: Mapping[tuple[str, ...], Tensor] | None = None) -> None:
    """Raise WeightError for tensors that are on meta, on several devices, of odd dtypes, or not finite: all of them.

    shares: what stands for the values of the parameters that they are named by.
    """
    tensors = live_tensors(model)
    problems = [*_meta(tensors), *_devices(tensors), *_dtypes(model)]
    problems = problems or list(_not_finite(model, shares or {}))
    if problems:
        raise WeightError(f"{type(model).__name__}: " + "; ".join(problems))


def check_forwards(module: nn.Module, path: str) -> None:
    """Raise ConfigError if something replaced the forward of a module that would no longer be called."""
    patched = [n or path for n, m in module.named_modules() if "forward" in vars(m)]
    if patched:
        raise ConfigError(
            f"the forward of {_few(patched)} has been replaced (by accelerate's hooks or by hand); a fused backbone "
            "would not call it: remove the replacement first"
        )


def _meta(tensors: dict[str, Tensor]) -> Iterator[str]:
    names = [n for n, t in tensors.items() if t.is_meta]
    if names:
        yield (
            f"{len(names)} of {len(tensors)} tensors are on the meta device, without values: {_few(names)}; "
            "checkpoint=FOLDER fills them"
        )


def _devices(tensors: dict[str, Tensor]) -> Iterator[str]:
    devices = sorted({str(t.device) for t in tensors.values() if not t.is_meta})
    if len(devices) > 1:
        yield f"its tensors are on several devices ({', '.join(devices)}): move it to one with model.to(device)"


def _dtypes(model: nn.Module) -> Iterator[str]:
    odd = [f"{n} ({p.dtype})" for n, p in model.named_parameters() if p.dtype not in FLOATS]
    if odd:
        yield f"parameters must be float32, float16 or bfloat16: {_few(odd)}"


def _not_finite(model: nn.Module, shares: Mapping[tuple[str, ...], Tensor]) -> Iterator[str]:
    apart = {k for keys in shares for k in keys}
    bad = [n for n, p in model.named_parameters() if n not in apart and p.numel() and not _finite(p)]
    bad += [" and ".join(keys) for keys, t in shares.items() if t.numel() and not _finite(t)]
    if bad:
        yield f"NaN or infinite weights in {_few(bad)}"


@torch.no_grad()
def _finite(t: Tensor) -> bool:
    low, high = torch.aminmax(t)  # both are NaN where any element is, and no copy is made
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _few(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
