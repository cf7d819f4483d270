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
from hasten.errors import ConfigError, UnsupportedModel
from hasten.families import FAMILIES
from hasten.inject.adapters import merge_adapters
from hasten.inject.attach import NoFamily, attach
from hasten.inject.backbone import Backbone
from hasten.inject.cast import Cast
from hasten.inject.certificate import certify, settings
from hasten.inject.checks import check_forwards, check_model, check_weights
from hasten.inject.engine import InferenceEngine
from hasten.inject.groups import Asked, join, local_device
from hasten.inject.held import held
from hasten.inject.invariance import check_fallbacks, check_invariance
from hasten.inject.joining import Division, check_divisible, compare, in_step
from hasten.inject.linears import Found, Linears, Names, find
from hasten.inject.loan import divides, live_tensors
from hasten.inject.options import Options
from hasten.inject.policy import resolve_policy, validate_policy
from hasten.inject.vocabulary import divisible, leavable
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
    group = None if division is None else division.everyone
    if options.checkpoint is None:
        return _saved(_engine(given, options, wanted, division, {}), options)
    filling, where = None, _device(given, options) or _home(given)
    try:
        with in_step(group, where, f"comparing checkpoint={options.checkpoint!r:.80} with the model"):
            filling, reader = _filling(given, options, division), None
            described = [] if division is None else _described(given, options)
            if division is not None and described:
                check_divisible((b.tower for b in described), division)
                division = _of_vocabulary(division, given, described)
                division = replace(division, home=torch.device("cpu") if filling.meta else None)
                reader = _reader(described, division, where)
        with in_step(group, where, f"reading checkpoint={options.checkpoint!r:.80}"):
            # of a live model that is divided only the shares go to the device
            whole = where if group is None or (filling.meta and reader is not None) else _home(given)
            shares = filling.fill(whole, reader)
        engine = _saved(_engine(given, options, wanted, division, shares), options)
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
            _parts(given, options, division)
    except BaseException:
        filling.undo()
        raise
    return filling


def _reader(backbones: list[Backbone], division: Division, where: torch.device) -> Reader:
    """What this rank reads."""
    away = set[str]()
    for p in backbones:
        stages = held(p.tower, p.bindings, division)
        away.update(k for b in p.bindings if stages is not None and not stages.here(b) for k in b.keys)
    group, device = division.group, division.device or where
    silent = division.everyone.rank > 0
    divided = partial(divides, division)
    return Reader(group.rank, group.size, division.experts, device, divided, frozenset(away), silent)


def _engine(
    given: nn.Module,
    options: Options,
    wanted: Mapping[str, Any] | None,
    division: Division | None,
    shares: Mapping[tuple[str, ...], Tensor],
) -> InferenceEngine:
    """shares: what this rank has read of what is divided, by the names of the live parameters."""
    model, backbones, found = _seen(given, options, division, shares)
    apart, linears, device = frozenset[int](), None, _device(model, options)
    if division is not None:
        division = _of_vocabulary(division, model, backbones)
        apart = _apart(model, backbones, division)
        if found is not None:
            linears, device = Linears(model, found, division), None  # it moves the model itself, once it is divided
    cast = Cast(
        model, options.dtype, device, options.keep_originals, apart, None if division is None else division.home
    )
    engine = InferenceEngine(model, options, backbones, cast, division, linears)
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


def _parts(model: nn.Module, options: Options, division: Division | None) -> tuple[list[Backbone], Found | None]:
    """The backbones that are fused; or, of several ranks, the plan by which a model without any is divided."""
    policy = options.injection_policy or {}
    validate_policy(model, policy)
    family = resolve_policy(model, policy, FAMILIES)
    names = {layer: value for layer, value in policy.items() if isinstance(value, tuple)}
    if not options.replace_with_kernel_inject:
        return [], None if division is None else _linearly(model, options, division, names)
    try:
        backbones = attach(model, family)
    except (UnsupportedModel, ConfigError) as error:
        if division is None or family is not None:
            raise
        return [], _linearly(model, options, division, names, error.why if isinstance(error, NoFamily) else str(error))
    for b in backbones:
        options.check_masking(b.tower.causal and b.seam.kind == "decoder")
        check_forwards(b.module, b.path)
    if options.batch_invariant:
        check_invariance(model, backbones, options.dtype, _device(model, options))
    return backbones, None


def _linearly(model: nn.Module, options: Options, division: Division, names: Names, instead: str = "") -> Found:
    if options.ep_size > 1:
        raise ConfigError(f"ep_size={options.ep_size} leaves experts whole, which takes a family that describes them")
    if division.stages is not None:
        raise ConfigError(f"pp_size={options.pp_size} cuts a model into stages, which takes a family that describes it")
    return find(model, names, division.group.size, instead)


def _described(model: nn.Module, options: Options) -> list[Backbone]:
    """The backbones of a model that ranks divide; none where it has no family, and there may be a plan for it."""
    family = resolve_policy(model, options.injection_policy, FAMILIES)
    try:
        return attach(model, family)
    except (UnsupportedModel, ConfigError):
        if family is not None:
            raise
        return []


def _of_vocabulary(division: Division, model: nn.Module, backbones: list[Backbone]) -> Division:
    leaving = frozenset[str]() if division.place.chain is None else leavable(model, backbones)
    return replace(division, vocabulary=divisible(model, backbones), leaving=leaving)


def _apart(model: nn.Module, backbones: list[Backbone], division: Division) -> frozenset[int]:
    """The ids of parameters of which this rank does not keep what the model has."""
    tensors, found = live_tensors(model), set[int]()
    for b in backbones:
        stages = held(b.tower, b.bindings, division)
        for one in b.bindings:
            if divides(division, one) or (stages is not None and not stages.here(one)):
                found.update(id(tensors[k]) for k in one.keys)
    return frozenset(found)


def _seen(
    given: nn.Module, options: Options, division: Division | None, shares: Mapping[tuple[str, ...], Tensor]
) -> tuple[nn.Module, list[Backbone], Found | None]:
    """The model, without adapters, and its parts, if every rank has found the same and can divide it."""
    on, group = _device(given, options) or _home(given), None if division is None else division.everyone
    with in_step(group, on, "looking at the model"):
        check_weights(given, shares)
        model = merge_adapters(given, options.merge_adapters, lambda m: _parts(m, options, None))
        if model is not given:
            check_weights(model)
        backbones, found = _parts(model, options, division)
        if division is not None:
            check_divisible((b.tower for b in backbones), division)
    if group is not None:
        read = {k for keys in shares for k in keys}
        if division is not None and options.checkpoint is not None:
            stages = [(b, s) for b in backbones if (s := held(b.tower, b.bindings, division)) is not None]
            read |= {k for b, s in stages for one in b.bindings if s.apart(one) for k in one.keys}
        described = [b.tower for b in backbones] if found is None else [found.plan]
        compare(group, on, model, described, read)
    return model, backbones, found


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
    cuts |= {} if engine.linears is None else engine.linears.stored
    state = engine.module.state_dict()  # of all ranks
    try:
        with in_step(group, engine.cast.device or _home(engine.module), f"writing save_mp_checkpoint_path={path!r}"):
            if group is None or group.rank == 0:
                save_split(Path(path), state.items(), cuts, ranks)
    except BaseException:
        engine.revert(force=True)
        raise
    return engine


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
