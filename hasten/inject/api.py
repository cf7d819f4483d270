"""From a live model and the user's options to an engine, or to one clear error and an untouched model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.checkpoints import Filling, Plan, open_checkpoint
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
from hasten.inject.groups import Asked, join, local_device
from hasten.inject.held import held
from hasten.inject.invariance import check_fallbacks, check_invariance
from hasten.inject.joining import Division, check_divisible, compare, in_step
from hasten.inject.loan import divides, live_tensors
from hasten.inject.options import Options
from hasten.inject.policy import resolve_policy, validate_policy
from hasten.ops.backends import load
from hasten.weights import Split


def init_inference(
    model: nn.Module, config: str | os.PathLike[str] | Mapping[str, Any] | None = None, **kwargs: Any
) -> InferenceEngine:
    """See hasten.init_inference."""
    options = Options.parse(config, **kwargs)
    wanted = settings(options.certify)
    load()
    given = check_model(model)
    division = _division(given, options)
    if options.checkpoint is None:
        return _saved(_engine(given, options, wanted, division), options)
    source = open_checkpoint(options.checkpoint, options.base_dir)
    filling = Filling(given, source, options.dtype, lambda: _plans(given, options))
    if not filling.meta:
        _backbones(given, options)  # a model that is refused keeps its values
    try:
        # of a model that is divided only the shares go to the device
        filling.fill(_home(given) if division is not None else _device(given, options) or _home(given))
        engine = _saved(_engine(given, options, wanted, division), options)
    except BaseException:
        filling.undo()
        raise
    engine.notes += filling.notes
    return engine


def _engine(
    given: nn.Module, options: Options, wanted: Mapping[str, Any] | None, division: Division | None
) -> InferenceEngine:
    model, backbones = _seen(given, options, division)
    apart = frozenset[int]() if division is None else _apart(model, backbones, division)
    cast = Cast(model, options.dtype, _device(model, options), options.keep_originals, apart)
    engine = InferenceEngine(model, options, backbones, cast, division)
    engine.start()
    if wanted is not None:
        try:
            engine.certificate = certify(engine, **wanted)
            if options.batch_invariant:
                check_fallbacks(backbones)
        except BaseException:
            engine.revert(force=True)
            raise
    return engine


def _apart(model: nn.Module, backbones: list[Backbone], division: Division) -> frozenset[int]:
    """The ids of parameters of which this rank does not keep what the model has."""
    tensors, chain, found = live_tensors(model), division.place.chain, set[int]()
    for b in backbones:
        stages = None if chain is None else held(b.tower, b.bindings, division.cuts(b.tower), chain)
        for one in b.bindings:
            if divides(division, one) or (stages is not None and not stages.here(one)):
                found.update(id(tensors[k]) for k in one.keys)
    return frozenset(found)


def _seen(given: nn.Module, options: Options, division: Division | None) -> tuple[nn.Module, list[Backbone]]:
    """The model, without adapters, and its backbones, if every rank has found the same and can divide it."""
    on, group = _device(given, options) or _home(given), None if division is None else division.everyone
    with in_step(group, on, "looking at the model"):
        check_weights(given)
        model = merge_adapters(given, options.merge_adapters, lambda m: _backbones(m, options))
        if model is not given:
            check_weights(model)
        backbones = _backbones(model, options)
        if division is not None:
            check_divisible((b.tower for b in backbones), division)
    if group is not None:
        compare(group, on, model, [b.tower for b in backbones])
    return model, backbones


def _division(model: nn.Module, options: Options) -> Division | None:
    """Among whom the model is divided; None where this process has it alone."""
    device = _device(model, options)
    place = join(_asked(options), device or _home(model))
    if place.everyone is None:
        return None
    assert place.tensor is not None, "join gives a group, if of one"
    experts: Split = "inside" if options.ep_size == 1 else "whole"
    return Division(place.tensor, experts, device, options.dtype, place.stages, options.layers)


def _asked(options: Options) -> Asked:
    return Asked(options.tp_size, options.tp_group, options.pp_size, options.pp_group, options.mpu)


def _saved(engine: InferenceEngine, options: Options) -> InferenceEngine:
    """The engine, its weights written where the user wants them, cut for as many ranks as there are."""
    path = options.save_mp_checkpoint_path
    if path is None:
        return engine
    division, ranks = engine.division, 1
    group = None if division is None else division.everyone
    if division is not None:
        ranks = division.group.size
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
        divided = _asked(options).ranks > 1
        return local_device() if divided else torch.device("cuda", torch.cuda.current_device())
    return None


def _home(model: nn.Module) -> torch.device:
    """Where the model is; the CPU for one on the meta device."""
    here = next((p.device for p in model.parameters()), None)
    if here is None:
        raise ConfigError(f"{type(model).__name__} has no parameters")
    return torch.device("cpu") if here.type == "meta" else here
