"""The files of all ranks put together: tensors by their rules, layers and experts numbered through."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hasten.checkpoints.files import few
from hasten.checkpoints.joining import Share, Whole, tensor_share
from hasten.checkpoints.megatron.naming import EXPERT, LAYER, moved
from hasten.checkpoints.megatron.places import Rank, sizes
from hasten.checkpoints.megatron.rules import join
from hasten.checkpoints.megatron.shard import Shard

HEAD, TOKENS = "output_layer.weight", "embedding.word_embeddings.weight"
Shares = dict[Rank, dict[str, Share]]


def assemble(shards: Mapping[Rank, Shard], version: int) -> tuple[dict[str, Whole], list[str]]:
    """Every tensor of the model by its plain name, and what is wrong with the files."""
    counts = sizes(shards)
    wholes: dict[str, Whole] = {}
    problems: list[str] = []
    layers = 0
    for chunk in range(max(len(s.chunks) for s in shards.values())):
        for stage in range(counts.stage):
            ranks = [r for r in shards if r.stage == stage and chunk < len(shards[r].chunks)]
            held = {r: _shares(shards[r], chunk) for r in ranks}
            made, wrong = _stage(held, layers, version)
            problems += wrong
            twice = [n for n in made if n in wholes and n not in (HEAD, TOKENS)]
            problems += [f"stage {stage} has {few(twice)}, as another stage has"] if twice else []
            wholes = {**made, **wholes}  # of what two stages have, the first one's
            layers = max((int(m[1]) + 1 for n in wholes if (m := LAYER.match(n))), default=0)
    if counts.stage > 1 and _copied(wholes, shards):
        del wholes[HEAD]
    return wholes, problems


def _shares(shard: Shard, chunk: int) -> dict[str, Share]:
    return {n: tensor_share(t, str(shard.path)) for n, t in shard.chunks[chunk].items()}


def _stage(held: Shares, layers: int, version: int) -> tuple[dict[str, Whole], list[str]]:
    """The tensors of one piece of the model, whose first layer has the number `layers`."""
    problems = _absent(held)
    experts = 1 + max((int(m[1]) for n in next(iter(held.values())) if (m := EXPERT.search(n))), default=-1)
    wholes: dict[str, Whole] = {}
    for expert in sorted({r.expert for r in held}):
        row = [held[r] for r in sorted(held) if r.expert == expert]
        shapes = {n: s.entry.shape for n, s in row[0].items()}
        for name in row[0]:
            shares = [rank[name] for rank in row if name in rank]
            if expert and not EXPERT.search(name):
                continue  # every rank of experts has it
            try:
                whole = join(name, shares, version, shapes)
            except ValueError as e:
                problems.append(f"{shares[0].entry.file}: {e}")
                continue
            wholes[moved(moved(name, LAYER, layers), EXPERT, expert * experts)] = whole
    return wholes, problems


def _absent(held: Shares) -> list[str]:
    """Tensors that some of the ranks of one stage have and others do not."""
    every = {n: s for shares in held.values() for n, s in shares.items()}
    return [
        f"{next(iter(shares.values())).entry.file} has no {few(lacking)}, which {every[lacking[0]].entry.file} has"
        for shares in held.values()
        if shares and (lacking := [n for n in every if n not in shares])
    ]


def _copied(wholes: Mapping[str, Whole], shards: Mapping[Rank, Shard]) -> bool:
    """Whether the head of the last stage is its copy of the word embeddings, by the arguments or else by its values."""
    if HEAD not in wholes or TOKENS not in wholes:
        return False
    untied = next(iter(shards.values())).arguments.get("untie_embeddings_and_output_weights")
    if untied is not None:
        return not untied
    return wholes[HEAD].shape == wholes[TOKENS].shape and torch.equal(wholes[HEAD].read(), wholes[TOKENS].read())
