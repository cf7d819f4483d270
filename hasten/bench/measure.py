"""Works done by several engines in turns, each model loaded once, results as soon as they are there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch

from hasten.bench import load, start
from hasten.bench.ceilings import Ceilings, memory
from hasten.bench.engines import Engine, Stand
from hasten.bench.kinds import KINDS, seconds
from hasten.bench.peers import HASTEN, PEERS, Peer
from hasten.bench.profile import profile
from hasten.bench.timing import Job, Result, interleave, result
from hasten.bench.work import NAMES, Work


@dataclass
class Bench:
    """One run of the benchmark. `notes` says what was left out and why; `failed`, whether that was Hasten.

    profiles: of a call of Hasten in each work, as Markdown, where there is a list for them.
    """

    device: torch.device
    ceilings: Ceilings
    peers: Sequence[str]  # keys of PEERS
    runs: int
    advance: Callable[[], Any] = lambda: None  # called after each timed turn
    notes: list[str] = field(default_factory=list)
    failed: bool = False
    profiles: list[str] | None = None
    invariant: bool = False  # Hasten's engines are made with batch_invariant=True
    ranks: int = 1  # processes that do all of this together, with Hasten's models divided among them

    def measure(self, works: Iterable[Work]) -> Iterator[tuple[Work, list[Result]]]:
        """Every work with its results, peers first and Hasten last. Works on the same model should lie side by side."""
        for (name, dtype, alone), group in groupby(works, lambda w: (w.model, w.dtype, self._alone(w))):
            stand = Stand(name, dtype, self.device, alone=alone, invariant=self.invariant, ranks=self.ranks)
            try:
                for w in group:
                    yield w, self._results(w, stand)
            finally:
                self._leave(stand)

    def _alone(self, w: Work) -> bool:
        """Whether no peer that is asked for would use the model: its memory is then Hasten's."""
        peers = (PEERS[name] for name in self.peers)
        return not any(p.shares and w.kind in p.serves for p in peers)

    def _results(self, w: Work, stand: Stand) -> list[Result]:
        try:
            if w.kind == "load":
                return self._loaded(w, stand)
            if w.kind not in KINDS:
                self._leave(stand)  # the process that is started wants the memory
                return self._start(w)
            return self._timed(w, stand, self._engines(w, stand))
        except Exception as e:  # whatever breaks one work, the others are to be measured
            self._left_out(w, HASTEN.title, e)
            return []

    def _engines(self, w: Work, stand: Stand) -> dict[str, Engine]:
        """The engines that are to do a work, by their titles: those that were made before, and new ones."""
        serving = [p for p in (*(PEERS[name] for name in self.peers), HASTEN) if w.kind in p.serves]
        for peer in serving:
            if peer.title in stand.engines:
                continue
            if hindrance := _hindrance(peer, stand):
                self._note(f"{peer.title} left out: {hindrance}")
                continue
            try:
                stand.engines[peer.title] = peer.make(stand)
            except Exception as e:
                self._left_out(w, peer.title, e)
        return {p.title: stand.engines[p.title] for p in serving if p.title in stand.engines}

    def _timed(self, w: Work, stand: Stand, engines: dict[str, Engine]) -> list[Result]:
        kind = KINDS[w.kind]
        jobs = {title: kind.job(w, stand, engine) for title, engine in engines.items()}
        before = memory(self.device, self.ceilings)
        with torch.inference_mode():
            times, failures = interleave(jobs, kind.runs(self.runs), advance=self.advance)
            self._profile(w, jobs, times)
        now = replace(self.ceilings, memory=(before + memory(self.device, self.ceilings)) / 2)
        for title, e in failures.items():
            self._left_out(w, title, e)
        least = kind.cost(w, stand.tower)
        results = []
        for title, measured in times.items():
            r = result(str(w), title, kind.values(w, engines[title], measured), w.unit)
            if least:
                attained, of, share = now.share(least, w.dtype, seconds(w, r.value))
                r = replace(r, attained=attained, of=of, share=share)
            results.append(r)
        return results

    def _profile(self, w: Work, jobs: Mapping[str, Job], times: Collection[str]) -> None:
        if self.profiles is not None and HASTEN.title in times:
            found = profile(jobs[HASTEN.title].sample, self.device)
            self.profiles.append(found.markdown(str(w)))

    def _loaded(self, w: Work, stand: Stand) -> list[Result]:
        asked = [p.title for p in (PEERS["transformers"], HASTEN) if p is HASTEN or "transformers" in self.peers]
        with load.folder(stand) as stored:
            self._leave(stand)  # what is loaded wants the memory
            jobs, leave = load.jobs(stand, stored)
            wanted = {title: jobs[title] for title in asked}
            if self.device.type == "cuda":
                self._note(f"{w}: pinned memory reaches the device at {load.bus(self.device) / 1e9:.1f} GB/s")
            times, failures = interleave(wanted, self.runs, advance=lambda: (leave(), self.advance()))
        for title, e in failures.items():
            self._left_out(w, title, e)
        found = [result(str(w), title, [t for (t,) in measured], w.unit) for title, measured in times.items()]
        return [replace(r, attained=stored.bytes / r.value / 1e9, of="GB/s") for r in found]

    def _start(self, w: Work) -> list[Result]:
        times = start.measure(w, self.device)
        self._note(f"{w}: {times}")
        whole = result(str(w), "hasten, from the start of the process", [times.process], w.unit)
        return [whole, result(str(w), HASTEN.title, [times.ready], w.unit)]

    def _leave(self, stand: Stand) -> None:
        """Say how Hasten's steps ran, which tells figures of recorded graphs from others, and give the memory back."""
        if stand.decoding is not None:
            self._note(f"{stand.name} {NAMES[stand.dtype]}: {stand.decoding}")
        stand.close()

    def _left_out(self, w: Work, title: str, e: Exception) -> None:
        lines = str(e).strip().splitlines()
        self._note(f"{w}: {title} left out: {type(e).__name__}: {lines[0] if lines else 'no reason given'}")
        self.failed |= title == HASTEN.title

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _hindrance(peer: Peer, stand: Stand) -> str | None:
    if peer.lacks:
        return f"{', '.join(peer.lacks)} cannot be imported here"
    if peer.shares and stand.alone:
        return f"{stand.name} leaves no memory for a second copy"
    return None
