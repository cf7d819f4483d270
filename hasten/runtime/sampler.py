"""From the logits of the rows that sample to their tokens: what `ops.sample` needs, gathered from the sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hasten import ops
from hasten.errors import RequestError
from hasten.ops import Choice
from hasten.runtime.request import Chosen, Sampling, uniform
from hasten.runtime.scheduler import Sequence as Line

OFF = Sampling()


class Sampler:
    """Keeps the parameter tensors of the last batch, which seldom changes from one token to the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._samplings: list[Sampling] = []
        self._choice = Choice()

    def choose(self, logits: Tensor, lines: Sequence[Line]) -> list[Chosen]:
        """A token for each row of logits (rows, vocabulary), float32 or wider, which may be written into."""
        samplings = [s.request.sampling for s in lines]
        raw = logits
        for i, s in enumerate(lines):
            if s.generated < s.request.sampling.min_new_tokens and s.request.ends:
                raw = raw.clone() if raw is logits else raw
                logits[i, sorted(s.request.ends)] = -torch.inf
        tokens = ops.sample(logits, self._settled(samplings), *self._state(lines, samplings))
        return self._reported(raw, tokens, lines, samplings)

    def _settled(self, samplings: list[Sampling]) -> Choice:
        if samplings != self._samplings:
            self._samplings, self._choice = samplings, choice(samplings, self.device)
        return self._choice

    def _state(
        self, lines: Sequence[Line], samplings: list[Sampling]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        draws = prompts = generated = None
        if not all(s.greedy for s in samplings):
            numbers = [uniform(s.request.seed, s.sample, s.generated) for s in lines]
            draws = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if any(s.penalized for s in samplings):
            prompts = self._ragged([s.request.prompt if s.request.sampling.penalized else () for s in lines])
            generated = self._ragged([s.spoken if s.request.sampling.penalized else () for s in lines])
        return draws, prompts, generated

    def _ragged(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """int64 (rows, longest), filled up with -1."""
        longest = max(map(len, rows))
        filled = [[*row, *[-1] * (longest - len(row))] for row in rows]
        return torch.tensor(filled, dtype=torch.int64, device=self.device).view(len(rows), longest)

    def _reported(self, raw: Tensor, tokens: Tensor, lines: Sequence[Line], samplings: list[Sampling]) -> list[Chosen]:
        at = raw.gather(1, tokens.unsqueeze(1)).squeeze(1)
        ids, scores = tokens.tolist(), at.tolist()
        for s, score in zip(lines, scores, strict=True):
            if score != score:
                raise RequestError(
                    f"prompt {s.request.index}: the model's logits for token {len(s.tokens)} are not numbers; "
                    "float16 overflows at 65504, so try bfloat16 or float32"
                )
        if all(s.logprobs is None for s in samplings):
            return [Chosen(token) for token in ids]
        return _with_logprobs(raw, ids, samplings)


def _with_logprobs(raw: Tensor, ids: list[int], samplings: list[Sampling]) -> list[Chosen]:
    shares = raw.log_softmax(-1)
    most = min(max(s.logprobs or 0 for s in samplings), raw.shape[1])
    best = shares.topk(most, -1)
    chosen = []
    for i, (token, s) in enumerate(zip(ids, samplings, strict=True)):
        if s.logprobs is None:
            chosen.append(Chosen(token))
            continue
        pairs = zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True)
        likeliest = dict(list(pairs)[: s.logprobs])
        chosen.append(Chosen(token, float(shares[i, token]), likeliest))
    return chosen


def choice(samplings: Sequence[Sampling], device: torch.device) -> Choice:
    """Parameters of each row; None where every row leaves one off."""

    def column(read: Callable[[Sampling], float], dtype: torch.dtype = torch.float32) -> Tensor | None:
        values = [read(s) for s in samplings]
        off = read(OFF)
        return None if all(v == off for v in values) else torch.tensor(values, dtype=dtype, device=device)

    return Choice(
        temperature=column(lambda s: s.temperature),
        min_p=column(lambda s: s.min_p),
        top_k=column(lambda s: s.top_k, torch.int64),
        top_p=column(lambda s: s.top_p, torch.float64),
        repetition=column(lambda s: s.repetition_penalty),
        presence=column(lambda s: s.presence_penalty),
        frequency=column(lambda s: s.frequency_penalty),
    )
