"""How long it takes from files to a model: a folder of safetensors that has just been written, in the page cache."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.bench.engines import Stand
from hasten.bench.peers import HASTEN, PEERS
from hasten.bench.shapes import make_empty
from hasten.bench.timing import Job, job, timed
from hasten.inject.groups import Asked, join
from hasten.parallel import Group


@dataclass(frozen=True, slots=True)
class Stored:
    """A folder of weights. group: the processes that read it, None where this one does so alone."""

    path: str
    bytes: int
    group: Group | None


@contextmanager
def folder(stand: Stand) -> Iterator[Stored]:
    """The stand's model as transformers saves it, written by one rank for all."""
    group = join(Asked(tp_size=stand.ranks), stand.device).tensor
    with tempfile.TemporaryDirectory() as own:
        if group is None or group.rank == 0:
            stand.model.save_pretrained(own)
        path = own if group is None else group.share(own)
        try:
            yield Stored(path, sum(f.stat().st_size for f in Path(path).glob("*.safetensors")), group)
        finally:
            if group is not None:
                group.share(None)  # nobody reads any more


def bus(device: torch.device) -> float:
    """Bytes a second that a GPU fetches from pinned memory, at best."""
    there = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    here = torch.empty_like(there, device=device)
    return there.numel() / min(timed(lambda: here.copy_(there)) for _ in range(5))


def jobs(stand: Stand, stored: Stored) -> tuple[dict[str, Job], Callable[[], None]]:
    """Loading by transformers, on the first rank alone, and by Hasten, by title; and what drops what was loaded."""
    kept: list[Any] = []
    path, group = stored.path, stored.group

    def theirs() -> None:
        from hasten.cli.load import load_model

        if group is None or group.rank == 0:
            auto = "AutoModelForCausalLM" if stand.kind == "decoder" else None
            kept.append(load_model(path, str(stand.dtype).removeprefix("torch."), auto=auto).to(stand.device))

    def ours() -> None:
        model = make_empty(stand.name, stand.dtype)
        kept.append(hasten.init_inference(model, checkpoint=path, device=str(stand.device), mp_size=stand.ranks))

    def leave() -> None:
        kept.clear()
        gc.collect()
        if stand.device.type == "cuda":
            torch.cuda.empty_cache()

    return {PEERS["transformers"].title: job(theirs), HASTEN.title: job(ours)}, leave
