"""A Source of Megatron's rank files, after everything that can be wrong with them has been looked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.checkpoints.files import together
from hasten.checkpoints.joining import Joined, Whole
from hasten.checkpoints.megatron.arguments import contradictions
from hasten.checkpoints.megatron.assemble import assemble
from hasten.checkpoints.megatron.dialect import VERSIONS, dialect
from hasten.checkpoints.megatron.naming import plain
from hasten.checkpoints.megatron.places import Places, Rank, holes, sizes
from hasten.checkpoints.megatron.shard import Shard, open_shard
from hasten.errors import WeightError
from hasten.spec import Tower

ALIKE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "padded_vocab_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)
"""Arguments that all ranks of one run share."""


class Megatron(Joined):
    """A whole model under plain names: a Foreign source (hasten.checkpoints.translate)."""

    def __init__(
        self, origin: str, wholes: Mapping[str, Whole], version: int, arguments: Mapping[str, Any], ranks: int
    ) -> None:
        """ranks: tensor-parallel ones, of which Megatron makes the vocabulary a multiple."""
        super().__init__(origin, wholes)
        self.dialect, self.arguments = dialect(version), arguments
        self.padding = int(arguments.get("make_vocab_size_divisible_by") or 128) * ranks
        self.plain = plain

    def contradictions(self, t: Tower) -> list[str]:
        return contradictions(self.arguments, t)


def open_ranks(origin: Path, places: Places, version: float | None = None, module_key: str | None = None) -> Megatron:
    """The source of which `places` hold the pieces. version: the order of fused rows; None: what the files say.

    Raises WeightError with everything that is wrong with the files. No tensor is read.
    """
    problems: list[str] = []
    shards: dict[Rank, Shard] = {}
    for rank, path in sorted(places.items()):
        try:
            shards[rank] = open_shard(path, module_key)
        except WeightError as e:
            problems.append(str(e))
    _refuse(origin, problems)
    return open_shards(origin, _experts(shards), version)


def open_shards(origin: Path, shards: Mapping[Rank, Shard], version: float | None = None) -> Megatron:
    """The source of files that are open, as `open_ranks` has it."""
    _refuse(origin, _contradictory(origin, shards))
    order, problems = _version(shards, version)
    wholes, wrong = assemble(shards, order)
    _refuse(origin, problems + wrong)
    return Megatron(str(origin), wholes, order, next(iter(shards.values())).arguments, sizes(shards).tensor)


def _refuse(origin: Path, problems: list[str]) -> None:
    if problems:
        raise WeightError(together(f"{origin} cannot be loaded", problems))


def _experts(shards: dict[Rank, Shard]) -> dict[Rank, Shard]:
    """The same where a folder's second number counts ranks of experts, which the arguments alone tell."""
    arguments = next(iter(shards.values())).arguments
    one = arguments.get("pipeline_model_parallel_size") == 1 and (arguments.get("expert_model_parallel_size") or 1) > 1
    return {Rank(r.tensor, 0, r.stage): s for r, s in shards.items()} if one else shards


def _contradictory(origin: Path, shards: Mapping[Rank, Shard]) -> list[str]:
    """Ranks that are missing, of other runs or iterations, or not as many as the files say there are."""
    problems = [f"{origin}: there is no file of {rank}" for rank in holes(shards)]
    held = sizes(shards)
    first = next(iter(shards.values()))
    for shard in shards.values():
        for what, one, other in (
            ("iteration", first.iteration, shard.iteration),
            ("checkpoint_version", first.version, shard.version),
            *((n, first.arguments.get(n), shard.arguments.get(n)) for n in ALIKE),
        ):
            if one != other:
                problems.append(f"{shard.path} is of {what} {other}, {first.path} of {what} {one}")
    for what, said, has in (
        ("mp_world_size", first.ranks, held.tensor),
        ("tensor_model_parallel_size", first.arguments.get("tensor_model_parallel_size"), held.tensor),
        ("pipeline_model_parallel_size", first.arguments.get("pipeline_model_parallel_size"), held.stage),
        ("expert_model_parallel_size", first.arguments.get("expert_model_parallel_size"), held.expert),
    ):
        if said is not None and said != has:
            problems.append(f"{first.path} was written with {what}={said}, and there are files of {has}")
    return problems


def _version(shards: Mapping[Rank, Shard], given: float | None) -> tuple[int, list[str]]:
    """The order of query_key_value's rows: as given, else as the files say; Megatron-Core's names say 3."""
    first = next(iter(shards.values()))
    core = all(s.core for s in shards.values())
    said = given if given is not None else first.version if first.version is not None else 3 if core else None
    if said is None:
        return 0, [
            f"{first.path} has no checkpoint_version, which the order of query_key_value's rows follows: say it with "
            'checkpoint={"type": "Megatron", "version": 0, 1.0, 2.0 or 3.0, "checkpoints": [files]} (the oldest '
            "releases wrote none, and theirs is 0)"
        ]
    order = int(said)
    if order not in VERSIONS:
        return 0, [f"checkpoint version {said} is not one of {', '.join(map(str, VERSIONS))} ({first.path})"]
    if core and order < 2:
        return 0, [f"version {said} is given, but {first.path} has Megatron-Core's names, whose rows are of version 3"]
    return order, []
