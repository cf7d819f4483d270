"""From a live model and the user's options to an engine, or to one clear error and an untouched model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.checkpoints import Filling, Plan, Reader, open_checkpoint
from hasten.checkpoints.save import save_split
from hasten.checkpoints.split import cuts_of
from hasten.errors import ConfigError
from hasten.families import FAMILIES
from hasten.inject.adapters import merge_adapters
from hasten.inject.attach import attach
from hasten.inject.backbone import Backbone
from hasten.inject.cast import Cast
from hasten.inject.certificate import certify, settings
from hasten.inject.checks import check_forwards, check_model, check_weights
from hasten.inject.engine import InferenceEngine
from hasten.inject.invariance import check_fallbacks, check_invariance
from hasten.inject.joining import Division, check_divisible, compare, in_step, join, local_device, ranks
from hasten.inject.loan import divides, live_tensors
from hasten.inject.options import Options
from hasten.inject.policy import resolve_policy, validate_policy
from hasten.inject.vocabulary import divisible
from hasten.ops.backends import load
from hasten.parallel import Group
from hasten.weights import Split


def init_inference(
    model: nn.Module, config: str | os.PathLike[str] | Mapping[str, Any] | None = None, **kwargs: Any
) -> InferenceEngine:
    """See hasten.init_inference."""
    options = Options.parse(config, **kwargs)
    wanted = settings(options.certify)
    load()
    given = check_model(model)
    group = _group(given, options)
    division = None if group is None else Division(group, _experts(options), _device(given, options), options.dtype)
    if options.checkpoint is None:
        return _saved(_engine(given, options, wanted, division, {}), options, group)
    filling, where = None, _device(given, options) or _home(given)
    try:
        with in_step(group, where, f"comparing checkpoint={options.checkpoint!r:.80} with the model"):
            filling = _filling(given, options, division)
            if division is not None:
                vocabulary = divisible(given, attach(given, resolve_policy(given, options.injection_policy, FAMILIES)))
                home = torch.device("cpu") if filling.meta else None
                division = replace(division, home=home, vocabulary=vocabulary)
        with in_step(group, where, f"reading checkpoint={options.checkpoint!r:.80}"):
            # of a live model that is divided only the shares go to the device
            shares = filling.fill(where if filling.meta or group is None else _home(given), _reader(division, where))
        engine = _saved(_engine(given, options, wanted, division, shares), options, group)
    except BaseException:
        if filling is not None:
            filling.undo()
        raise
    engine.notes += filling.notes
    return engine


def _filling(given: nn.Module, options: Options, division: Division | None) -> Filling:
    """The checkpoint, checked against the model; a model that would be refused keeps its values."""
    source = open_checkpoint(options.checkpoint, options.base_dir)
    filling = Filling(given, source, options.dtype, lambda: _plans(given, options))
    try:
        if not filling.meta:
            _backbones(given, options)
        if division is not None:
            check_divisible((p.tower for p in _plans(given, options)), division.group.size, division.experts)
    except BaseException:
        filling.undo()
        raise
    return filling


def _reader(division: Division | None, where: torch.device) -> Reader | None:
    if division is None:
        return None
    group = division.group
    return Reader(group.rank, group.size, division.experts, division.device or where, partial(divides, division))


def _engine(
    given: nn.Module,
    options: Options,
    wanted: Mapping[str, Any] | None,
    division: Division | None,
    shares: Mapping[tuple[str, ...], Tensor],
) -> InferenceEngine:
    """shares: what this rank has read of what is divided, by the names of the live parameters."""
    group = None if division is None else division.group
    model, backbones = _seen(given, options, group, shares)
    device, apart = _device(model, options), frozenset[int]()
    if division is not None:
        division = replace(division, vocabulary=divisible(model, backbones))
        tensors, bindings = live_tensors(model), [one for b in backbones for one in b.bindings]
        apart = frozenset(id(tensors[k]) for one in bindings if divides(division, one) for k in one.keys)
    cast = Cast(model, options.dtype, device, options.keep_originals, apart, division and division.home)
    engine = InferenceEngine(model, options, backbones, cast, division)
    engine.start(shares)
    if wanted is not None:
        try:
            engine.certificate = certify(engine, **wanted)
            if options.batch_invariant:
                check_fallbacks(backbones)
        except BaseException:
            engine.revert(force=True)
            raise
    return engine


def _seen(
    given: nn.Module, options: Options, group: Group | None, shares: Mapping[tuple[str, ...], Tensor]
) -> tuple[nn.Module, list[Backbone]]:
    """The model, without adapters, and its backbones, if every rank has found the same and can divide it."""
    on = _device(given, options) or _home(given)
    with in_step(group, on, "looking at the model"):
        check_weights(given, shares)
        model = merge_adapters(given, options.merge_adapters, lambda m: _backbones(m, options))
        if model is not given:
            check_weights(model)
        backbones = _backbones(model, options)
        if group is not None:
            check_divisible((b.tower for b in backbones), group.size, _experts(options))
    if group is not None:
        compare(group, on, model, [b.tower for b in backbones], {k for keys in shares for k in keys})
    return model, backbones


def _group(model: nn.Module, options: Options) -> Group | None:
    """The processes that hold the model together; None where this one does so alone."""
    return join(options.tp_size, options.mpu, options.tp_group, _device(model, options) or _home(model))


def _experts(options: Options) -> Split:
    return "inside" if options.ep_size == 1 else "whole"


def _saved(engine: InferenceEngine, options: Options, group: Group | None) -> InferenceEngine:
    """The engine, its weights written where the user wants them, cut for as many ranks as there are."""
    path = options.save_mp_checkpoint_path
    if path is None:
        return engine
    ranks = 1 if group is None else group.size
    cuts = {n: c for b in engine.backbones for n, c in cuts_of(b.bindings, ranks).items()}
    state = engine.module.state_dict()  # of all ranks
    try:
        with in_step(group, engine.cast.device or _home(engine.module), f"writing save_mp_checkpoint_path={path!r}"):
            if group is None or group.rank == 0:
                save_split(Path(path), state.items(), cuts, ranks)
    except BaseException:
        engine.revert(force=True)
        raise
    return engine


def _backbones(model: nn.Module, options: Options) -> list[Backbone]:
    policy = options.injection_policy
    if policy is not None:
        validate_policy(model, policy)
    family = resolve_policy(model, policy, FAMILIES)
    if not options.replace_with_kernel_inject:
        return []
    backbones = attach(model, family)
    for b in backbones:
        options.check_masking(b.tower.causal and b.seam.kind == "decoder")
        check_forwards(b.module, b.path)
    if options.batch_invariant:
        check_invariance(model, backbones, options.dtype, _device(model, options))
    return backbones


def _plans(model: nn.Module, options: Options) -> list[Plan]:
    """What the model is and where it keeps its weights, for checkpoints with names of their own."""
    backbones = attach(model, resolve_policy(model, options.injection_policy, FAMILIES))
    return [Plan(b.tower, b.bindings, f"{b.path}." if b.path else "") for b in backbones]


def _device(model: nn.Module, options: Options) -> torch.device | None:
    """Where the model goes: where the user says, else to the GPU if there is one and the model is not on it."""
    here = _home(model)
    if options.device is not None:
        return options.device
    if here.type == "cpu" and torch.cuda.is_available() and not options.keep_module_on_host:
        divided = ranks(options.tp_size, options.mpu, options.tp_group) > 1
        return local_device() if divided else torch.device("cuda", torch.cuda.current_device())
    return None


def _home(model: nn.Module) -> torch.device:
    """Where the model is; the CPU for one on the meta device."""
    here = next((p.device for p in model.parameters()), None)
    if here is None:
        raise ConfigError(f"{type(model).__name__} has no parameters")
    return torch.device("cpu") if here.type == "meta" else here
