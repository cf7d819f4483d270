"""What a tower with random weights computes, alone or as one rank of a group: the same numbers, if all is well."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from hasten.inject.attach import attach
from hasten.model import Dense, Transformer
from hasten.parallel import ALONE, Group, Place, Processes
from hasten.spec import Attention, Frames, Mlp, Patches, Tokens, Tower
from hasten.weights import Split, local, params, shard
from tests.tiny import TINY, build


def towers(name: str) -> list[Tower]:
    """The towers of a tiny model of a family."""
    return [b.tower for b in attach(build(TINY[name]))]


def grown(t: Tower) -> Tower:
    """The same with four times the heads, and mlps whose columns divide by four."""

    def heads(a: Attention) -> Attention:
        kv_heads = a.kv_heads if a.kv_heads == 1 else 4 * a.kv_heads
        return replace(a, heads=4 * a.heads, kv_heads=kv_heads)

    def columns(m: Mlp) -> Mlp:
        return replace(m, width=m.width + -m.width % 4)

    blocks = []
    for b in t.blocks:
        m = b.mlp
        if isinstance(m, Mlp):
            m = columns(m)
        else:
            shared = None if m.shared is None else columns(m.shared)
            m = replace(m, experts=m.experts + -m.experts % 4, expert=columns(m.expert), shared=shared)
        cross = None if b.cross is None else heads(b.cross)
        blocks.append(replace(b, attention=heads(b.attention), cross=cross, mlp=m))
    return replace(t, blocks=tuple(blocks))


def weights(t: Tower) -> dict[str, Tensor]:
    """The same random weights at every call; hidden states keep their size on the way through."""
    random = torch.Generator().manual_seed(1)  # threads share the default one
    made = {}
    for p in params(t):
        w = torch.randn(p.shape, generator=random)
        columns = p.columns[-1] if p.columns else 1
        made[p.name] = w / columns**0.5 if p.columns and p.role not in ("heads", "heads_table") else 1 + w / 4
    return made


class Kept:
    """A store of keys and values that grows."""

    def __init__(self) -> None:
        self.all: dict[int, tuple[Tensor, Tensor]] = {}
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        if i in self.all:
            k, v = (torch.cat(both, 1) for both in zip(self.all[i], (k, v), strict=True))
        self.all[i] = k, v
        return k, v, 0

    def remember(self, i: int, make) -> tuple[Tensor, Tensor]:
        if i not in self.memory:
            self.memory[i] = make()
        return self.memory[i]


@torch.no_grad()
def computed(t: Tower, group: Group | None = None, experts: Split = "inside", split_vocab: bool = False) -> Tensor:
    """Logits, or finished hidden states, of a padded batch; a causal tower gets the last token in a step of its own."""
    whole, own, place = weights(t), t, ALONE
    held = whole
    if group is not None:
        rank, size, place = group.rank, group.size, Place(group)
        own = local(t, rank, size, experts)
        vocab = () if split_vocab else ("vocab",)
        held = {
            p.name: whole[p.name] if p.role in vocab else shard(p, whole[p.name], rank, size, experts)
            for p in params(t)
        }
    model = Transformer(own, held, place=place)
    random = torch.Generator().manual_seed(2)
    tokens = 7
    match t.embed:
        case Tokens() as e:
            x = torch.randint(0, e.vocab, (2, tokens), generator=random)
            assert e.positions is None or e.positions >= tokens + e.position_offset
        case Patches():
            x = torch.randn(2, tokens, t.width, generator=random)
        case Frames() as e:
            tokens = e.positions
            x = torch.randn(2, e.mels, 2 * e.positions, generator=random)
    seen = torch.ones(2, tokens, dtype=torch.bool)
    seen[1, :2] = False
    positions = torch.arange(tokens).expand(2, tokens)
    memory = torch.randn(2, 5, t.width, generator=random)
    store = Kept() if t.causal else None
    parts = [(0, tokens - 1), (tokens - 1, tokens)] if t.causal else [(0, tokens)]
    made = []
    for first, last in parts:
        ctx = Dense(
            positions[:, first:last],
            past=first,
            seen=seen[:, :last],
            store=store,
            memory=memory,
            buckets=model.buckets,
        )
        h = model.embed(x if isinstance(t.embed, Frames) else x[:, first:last], positions[:, first:last])
        h = model.blocks(h, ctx)
        made.append(model.predict(h) if t.head is not None else model.finish(h))
    return torch.cat(made, 1)


def on_rank(t: Tower, experts: Split, split_vocab: bool) -> Tensor:
    """`computed` on a rank of the group that this process is in."""
    world = dist.group.WORLD
    assert world is not None
    return computed(t, Processes(world), experts, split_vocab)
