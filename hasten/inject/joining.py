"""Whether all processes that hold a model together hold the same one, and how they divide it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hasten.errors import HastenError, WeightError
from hasten.parallel import Chain, Group, Place
from hasten.spec import Tower
from hasten.weights import Cuts, Split, check, counted, cut

SAID = 1000  # bytes of an error that the other ranks hear
COMPARED = ("the parameters' names, shapes and dtypes", "the parameters' values", "the description of the layers")


@dataclass(frozen=True, slots=True)
class Division:
    """Among whom a model is divided, how its experts are, and where this rank keeps its share (None: as the model).

    group: the ranks that divide every layer. stages: those that hold layers one after the other. layers: how many
    blocks each stage has, where the user says. home: where whole tensors go when they are wanted again (None: where
    the model had them). Slots of the vocabulary's parameters: `vocabulary` are divided too, `leaving` are left to the
    stages that read them.
    """

    group: Group
    experts: Split = "inside"
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    stages: Chain | None = None
    layers: tuple[int, ...] | None = None
    home: torch.device | None = None
    vocabulary: frozenset[str] = frozenset()
    leaving: frozenset[str] = frozenset()

    @property
    def place(self) -> Place:
        return Place(self.group, self.stages)

    @property
    def everyone(self) -> Group:
        """All ranks that hold the model together."""
        return self.place.everyone or self.group

    def cuts(self, t: Tower) -> Cuts:
        """The blocks of each stage."""
        if self.layers is not None:
            return counted(t, self.layers)
        return cut(t, 1 if self.stages is None else self.stages.size)

    def blocks(self, t: Tower) -> range:
        """Those of this one."""
        return self.cuts(t)[0 if self.stages is None else self.stages.rank]


def check_divisible(towers: Iterable[Tower], d: Division) -> None:
    """ConfigError unless every tower can be divided so."""
    for t in towers:
        check(t, d.group.size, d.experts)
        d.cuts(t)


@contextmanager
def in_step(group: Group | None, device: torch.device, what: str) -> Iterator[None]:
    """What fails inside on one rank fails on all: there with its own error, elsewhere with one that tells of it.

    device: where the group exchanges. Inside, ranks do not wait for each other. Raises HastenError.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    if group is not None:
        said = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()[:SAID]
        own = torch.tensor(list(said.ljust(SAID, b"\0")), dtype=torch.uint8, device=device)
        heard = [bytes(told).rstrip(b"\0") for told in group.all_gather(own).view(group.size, SAID).tolist()]
        if failure is None and any(heard):
            parts = [f"rank {r}: {told.decode(errors='replace')}" for r, told in enumerate(heard) if told]
            failure = HastenError(
                f"{what} failed elsewhere, so rank {group.rank} of {group.size} gave it up too. " + "; ".join(parts)
            )
    if failure is not None:
        raise failure


def compare(
    group: Group, device: torch.device, model: nn.Module, described: Iterable[object], apart: Collection[str] = ()
) -> None:
    """WeightError, on every rank, where ranks do not hold the same model; `apart` are names whose values are not.

    described: what each has found out about its layers; equal values are printed alike.
    """
    heard = (
        group.all_gather(torch.tensor(_digests(model, described, apart), device=device)).view(group.size, -1).tolist()
    )
    unlike = [r for r, told in enumerate(heard) if told != heard[0]]
    if unlike:
        parts = [what for k, what in enumerate(COMPARED) if any(told[k] != heard[0][k] for told in heard)]
        raise WeightError(
            f"{_named(unlike)} of {group.size} loaded another model than rank 0: {' and '.join(parts)} differ; every "
            "rank has to give init_inference the same"
        )


def _named(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _digests(model: nn.Module, described: Iterable[object], apart: Collection[str]) -> list[int]:
    """Numbers that differ, but for chance, where models do, in the order of COMPARED: of each tensor three values."""
    tensors: Mapping[str, Tensor] = dict(model.named_parameters())
    shapes = [(n, tuple(t.shape), str(t.dtype)) for n, t in tensors.items()]
    with torch.no_grad():
        whole = [t for n, t in tensors.items() if t.numel() and n not in apart]
        few = torch.stack([t[at].double() for t in whole for at in _places(t.shape)]).tolist() if whole else []
    return [_number(repr(x)) for x in (shapes, few, [*described])]


def _places(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The first, a middle and the last place."""
    return [tuple(0 for _ in shape), tuple(n // 2 for n in shape), tuple(n - 1 for n in shape)]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def share_draws(group: Group) -> None:
    """Every rank draws what rank 0 draws from here on, by torch's own generators of the host and its GPU."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    host, device = group.share((torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None))
    torch.set_rng_state(host)
    if device is not None and cuda:
        torch.cuda.set_rng_state(device)
