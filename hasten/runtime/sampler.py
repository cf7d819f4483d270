"""From the logits of the rows that sample to their tokens: what `ops.sample` needs, gathered from the sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten import ops
from hasten.ops import Choice
from hasten.runtime.request import Chosen, Sampling, uniform
from hasten.runtime.scheduler import Sequence as Line
from hasten.runtime.transfer import Download, upload

OFF = Sampling()

Columns = tuple[str, ...]
"""The parameters of `Choice` that a batch uses."""

COLUMNS: dict[str, tuple[Callable[[Sampling], float], torch.dtype]] = {
    "temperature": (lambda s: s.temperature, torch.float32),
    "min_p": (lambda s: s.min_p, torch.float32),
    "top_k": (lambda s: s.top_k, torch.int64),
    "top_p": (lambda s: s.top_p, torch.float64),
    "repetition": (lambda s: s.repetition_penalty, torch.float32),
    "presence": (lambda s: s.presence_penalty, torch.float32),
    "frequency": (lambda s: s.frequency_penalty, torch.float32),
}
FILTERS: Columns = ("min_p", "top_k", "top_p")


class Sampler:
    """Keeps the parameter tensors of the last batch, which seldom changes from one token to the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._samplings: list[Sampling] = []
        self._choice = Choice()

    def choose(self, logits: Tensor, lines: Sequence[Line]) -> Choosing:
        """A token for each row of logits (rows, vocabulary), which may be written into."""
        samplings = [s.request.sampling for s in lines]
        raw = logits
        for i, s in enumerate(lines):
            if held_back(s):
                raw = raw.clone() if raw is logits else raw
                logits[i].index_fill_(0, upload(sorted(s.request.ends), torch.int64, self.device), -torch.inf)
        tokens = ops.sample(logits, self._settled(samplings), *self._state(lines, samplings))
        wanted = most_wanted(samplings)
        return Choosing(samplings, tokens, () if wanted is None else _scores(raw, tokens, wanted))

    def _settled(self, samplings: list[Sampling]) -> Choice:
        if samplings != self._samplings:
            self._samplings, self._choice = samplings, choice(samplings, self.device)
        return self._choice

    def _state(
        self, lines: Sequence[Line], samplings: list[Sampling]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        draws = prompts = generated = None
        if not all(s.greedy for s in samplings):
            draws = upload([draw(s, 0) for s in lines], torch.float64, self.device)
        if any(s.penalized for s in samplings):
            prompts = self._ragged([s.request.prompt if s.request.sampling.penalized else () for s in lines])
            generated = self._ragged([s.spoken if s.request.sampling.penalized else () for s in lines])
        return draws, prompts, generated

    def _ragged(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """int64 (rows, longest), filled up with -1."""
        longest = max(map(len, rows))
        filled = [t for row in rows for t in (*row, *[-1] * (longest - len(row)))]
        return upload(filled, torch.int64, self.device).view(len(rows), longest)


class Choosing:
    """The tokens that a batch chose, int64 (rows,), and the logarithms asked for, on their way to the host."""

    def __init__(self, samplings: list[Sampling], tokens: Tensor, scores: Sequence[Tensor]) -> None:
        self._samplings, self.tokens, self.scores = samplings, tokens, scores
        self._download = Download(tokens, *scores)

    def chosen(self) -> list[Chosen]:
        """One each, with logarithms where they are wanted; token -1 where the logits were not numbers."""
        tokens, *scores = self._download.tensors()
        if not scores:
            return [Chosen(token) for token in tokens.tolist()]
        rows = zip(self._samplings, tokens.tolist(), *(t.tolist() for t in scores), strict=True)
        return [_scored(*row) for row in rows]


def most_wanted(samplings: Sequence[Sampling]) -> int | None:
    """How many of the likeliest tokens somebody wants to know, None where nobody wants logarithms."""
    return max((s.logprobs for s in samplings if s.logprobs is not None), default=None)


def _scored(s: Sampling, token: int, share: float, best: list[int], shares: list[float]) -> Chosen:
    if s.logprobs is None:
        return Chosen(token)
    return Chosen(token, share, dict(zip(best[: s.logprobs], shares[: s.logprobs], strict=True)))


def _scores(raw: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of the chosen tokens' shares (rows,), and the likeliest tokens with theirs, (rows, most)."""
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    chosen, most = tokens.clamp(min=0).unsqueeze(1), min(most, raw.shape[1])
    if ops.is_invariant():
        # rows begin at multiples of 16 bytes, or torch adds each up from another place on, and equals keep their order
        shares = F.pad(raw, (0, -raw.shape[1] % 4), value=-torch.inf).log_softmax(-1)
        values, indices = shares.sort(dim=-1, descending=True, stable=True)
        return shares.gather(1, chosen).squeeze(1), indices[:, :most], values[:, :most]
    shares = raw.log_softmax(-1)
    best = shares.topk(most, -1)
    return shares.gather(1, chosen).squeeze(1), best.indices, best.values


def choice(samplings: Sequence[Sampling], device: torch.device) -> Choice:
    """Parameters of each row; None where every row leaves one off."""
    found = {}
    for name, (read, dtype) in COLUMNS.items():
        values = [read(s) for s in samplings]
        if any(v != read(OFF) for v in values):
            found[name] = upload(values, dtype, device)
    return Choice(**found)


def columns(lines: Sequence[Line]) -> Columns | None:
    """What a step that samples on the device has to read, or None where the host has a part in choosing.

    Few answers, since a step is recorded for each: none of them, temperature, temperature and all filters.
    """
    different = {id(line.request.sampling): line.request.sampling for line in lines}.values()
    if any(s.penalized or s.logprobs is not None for s in different):
        return None
    if any(s.min_new_tokens for s in different) and any(map(held_back, lines)):
        return None
    if all(s.greedy for s in different):
        return ()
    plain = all(COLUMNS[f][0](s) == COLUMNS[f][0](OFF) for s in different for f in FILTERS)
    return ("temperature",) if plain else ("temperature", *FILTERS)


def held_back(line: Line) -> bool:
    """Whether the next token may be none that stops."""
    return line.generated < line.request.sampling.min_new_tokens and bool(line.request.ends)


def draw(line: Line, ahead: int) -> float:
    """The number that decides the token so many steps ahead; 0 where nothing is drawn."""
    r = line.request
    return 0.0 if r.sampling.greedy else uniform(r.seed, line.sample, line.generated + ahead)
