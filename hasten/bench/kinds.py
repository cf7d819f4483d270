"""The kinds of work: what is called, what its seconds mean, and what it costs at least."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hasten.bench import cost
from hasten.bench.cost import Cost
from hasten.bench.engines import Engine, Stand
from hasten.bench.timing import Job, job
from hasten.bench.work import SHORTEST, Work
from hasten.spec import Patches, Tower

Times = Sequence[tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Kind:
    """runs: timed turns, given those that were asked for."""

    job: Callable[[Work, Stand, Engine], Job]
    values: Callable[[Work, Engine, Times], list[float]]  # in the work's unit, one of each turn
    cost: Callable[[Work, Tower], Sequence[Cost]]  # of its phases; of none where nobody can tell
    runs: Callable[[int], int] = lambda runs: runs


def rounds(stand: Stand) -> int:
    """Of a warm-up: on a GPU what repeats itself is recorded, at the fourth time at the latest."""
    return 4 if stand.device.type == "cuda" else 1


def prompts(vocab: int, lengths: Sequence[int]) -> list[list[int]]:
    """Token ids, the same for the same work."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def mix(w: Work) -> list[tuple[int, int]]:
    """Lengths of the prompt and of the completion of every request: uniform, and the same in every run."""
    r = random.Random(0)
    shortest = min(SHORTEST, w.prompt, w.new)
    return [(r.randint(shortest, w.prompt), r.randint(shortest, w.new)) for _ in range(w.batch)]


def steps(w: Work, e: Engine) -> int:
    """Over how many steps decoding is measured."""
    return max(1, w.new // e.pace)


def _generate(w: Work, s: Stand, e: Engine) -> Job:
    asked = prompts(s.vocab, [w.prompt] * w.batch)
    return job(lambda: e.generate(asked, [w.new] * w.batch), rounds=rounds(s))


def _decode(w: Work, s: Stand, e: Engine) -> Job:
    asked, new = prompts(s.vocab, [w.prompt] * w.batch), 1 + steps(w, e)
    one, many = (partial(e.generate, asked, [n] * w.batch) for n in (1, new))
    return job(one, many, rounds=rounds(s))


def _prefill(w: Work, s: Stand, e: Engine) -> Job:
    asked = prompts(s.vocab, [w.prompt] * w.batch)
    return job(lambda: e.generate(asked, [1] * w.batch), rounds=rounds(s))


def _encode(w: Work, s: Stand, e: Engine) -> Job:
    inputs = s.inputs(w.batch, w.prompt)
    return job(lambda: e.encode(inputs), rounds=rounds(s))


def _offline(w: Work, s: Stand, e: Engine) -> Job:
    lengths = mix(w)
    asked, new = prompts(s.vocab, [n for n, _ in lengths]), [n for _, n in lengths]
    # half of the requests, an eighth as long: what comes up again and again in the work is compiled then
    some = asked[: -(-len(asked) // 2)], [-(-n // 8) for n in new[: -(-len(new) // 2)]]
    glimpse = asked[:32], [min(n, SHORTEST) for n in new[:32]]  # a profile of everything would be too long to be read

    def warm() -> None:
        e.prepare(w.batch, w.tokens)
        e.generate(*some)

    return Job(warm, (lambda: e.generate(asked, new),), lambda: e.generate(*glimpse))


def _rate(w: Work, e: Engine, times: Times) -> list[float]:
    made = sum(n for _, n in mix(w)) if w.kind == "offline" else w.batch * w.new
    return [made / t for (t,) in times]


def _milliseconds(w: Work, e: Engine, times: Times) -> list[float]:
    return [t * 1e3 for (t,) in times]


def _a_step(w: Work, e: Engine, times: Times) -> list[float]:
    first = statistics.median(t for t, _ in times)
    return [(t - first) / steps(w, e) * 1e3 for _, t in times]


def _step_cost(w: Work, t: Tower) -> list[Cost]:
    return [cost.step(t, w.dtype.itemsize, w.batch, w.prompt + w.new / 2)]


def _passage_cost(w: Work, t: Tower) -> list[Cost]:
    return [cost.passage(t, w.dtype.itemsize, w.batch, _length(w, t))]


def _whole_cost(w: Work, t: Tower) -> list[Cost]:
    """Of the prompt, which gives the first token, and of the steps."""
    return _passage_cost(w, t) + _step_cost(w, t) * (w.new - 1)


def _length(w: Work, t: Tower) -> int:
    """Rows of one sequence: an image's are its patches and what stands before them."""
    if not isinstance(t.embed, Patches):
        return w.prompt
    (height, width), (rows, columns) = t.embed.image, t.embed.patch
    return (height // rows) * (width // columns) + 1


KINDS: dict[str, Kind] = {
    "generate": Kind(_generate, _rate, _whole_cost),
    "decode": Kind(_decode, _a_step, _step_cost),
    "prefill": Kind(_prefill, _milliseconds, _passage_cost, lambda runs: 2 * runs),
    "encode": Kind(_encode, _milliseconds, _passage_cost, lambda runs: 4 * runs),
    "offline": Kind(_offline, _rate, lambda w, t: (), lambda runs: 1),
}


def seconds(w: Work, value: float) -> float:
    """How long the work takes whose cost is told, from its value."""
    return w.batch * w.new / value if w.kind == "generate" else value / 1e3
