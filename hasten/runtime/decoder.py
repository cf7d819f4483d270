"""Passes that are recorded: the device runs several decode steps by itself, and short prompts in one launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hasten.model import Transformer
from hasten.runtime.fixed import Kept
from hasten.runtime.graphs import Recorder, Unrecordable
from hasten.runtime.passes import Burst, Pass, Single, carry
from hasten.runtime.runs import MOST_TOKENS, Runs, padded, sizes
from hasten.runtime.sampler import Choosing, Columns, Sampler, columns
from hasten.runtime.scheduler import Row
from hasten.runtime.stage import Stage
from hasten.runtime.steps import MOST, Steps
from hasten.runtime.transfer import Moment
from hasten.spec import Alibi, Dynamic, LongRope, Tokens

PLACES = 256
"""Sequences that run at once, at most."""

PATIENCE = 8
"""Times that a record of more places serves before a shape gets its own: a batch that runs dry passes many."""

PAGES, MORE_PAGES = 32, 128
"""Columns of the smallest page table, and of the smallest beside more than 16 places or 256 tokens, which it costs
nothing."""

TIMES = {0: (2, 2), 256: (4, 4), MOST_TOKENS: (16, 4)}
"""Up to so many tokens of runs, how many times as many places and columns the next larger record has. An empty place
costs little beside many tokens, and prompts of all lengths and numbers meet in few records."""


@dataclass(frozen=True, slots=True)
class Shape:
    """tokens: of runs, 0 where every sequence has one new token. places and pages of each: as `TIMES` has them."""

    tokens: int
    places: int
    pages: int

    def holds(self, other: Shape) -> bool:
        """Whether what the other shape is for fits, with nothing more to compute than places and pages."""
        return self.tokens == other.tokens and self.places >= other.places and self.pages >= other.pages


Key = tuple[Shape, Columns | None]
"""What a record is for; None: it ends at the logits. One of a stage that chooses nothing ends at hidden states."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows that a record can serve. tokens: as in Shape. how: they choose. most: steps worth handing over at once."""

    rows: Sequence[Row]
    tokens: int
    how: Columns | None
    most: int

    @property
    def stop(self) -> int:
        """Tokens of the longest sequence."""
        return max(row.stop for row in self.rows)


class Decoder:
    """Keeps one record for each shape and way of choosing.

    A record holds addresses, so all are forgotten when the pools move. What cannot be recorded is not tried twice. Runs
    of tokens are recorded when a shape comes up for the second time, since most come up once, and decode steps at once;
    either later where a record of more places can serve for a while.
    """

    def __init__(
        self, model: Transformer, kept: Kept, sampler: Sampler, recorder: Recorder, stage: Stage | None = None
    ) -> None:
        self.model, self.kept, self.stage = model, kept, stage
        self._sampler, self._recorder = sampler, recorder
        self.forget()

    def forget(self) -> None:
        """Give up every record and the tensors they read."""
        self._read = self.kept.pools.layers[0][0]  # the first of the pools that the records read
        self._states: dict[Shape, Steps | Runs] = {}
        self._records: dict[Key, Callable[[], Tensor | None]] = {}
        self._seconds: dict[Key, float] = {}
        self._refused: dict[Key, str] = {}
        self._seen: Counter[Key] = Counter()

    def __str__(self) -> str:
        why = obstacle(self.model)
        if why is not None:
            return f"decode steps run launch by launch: {why}"
        refused = [f"not {s.places} places: {why}" for (s, _), why in self._refused.items()]
        return "; ".join([f"decode steps are recorded as a whole, {len(self._records)} records so far", *refused])

    def plan(self, rows: Sequence[Row], *, behind: bool) -> Plan | None:
        """How these rows would run; None where no record can serve them. behind: a pass that is not waited for."""
        if len(rows) > PLACES or obstacle(self.model) is not None:
            return None
        tokens = sum(row.stop - row.start for row in rows)
        how = columns([r.sequence for r in rows if r.samples]) if self.model.place.last else ()
        if tokens > len(rows) or not all(row.samples for row in rows):
            return Plan(rows, padded(tokens), how, 1) if tokens <= MOST_TOKENS else None
        plan = Plan(rows, 0, how, 1)
        key = self._key(plan, 1)
        if how is None or key in self._refused or self.stage is not None:
            return plan
        # ranks that share the model time steps differently, and have to begin equally many
        took = None if self.model.place.over else self._seconds.get(self._serving(key) or key)
        most = self._recorder.steps(took)
        if behind:
            most = max(most // 2, 1)  # two bursts wait for each other, and one may be idle
        return Plan(rows, 0, how, min(most, MOST, _room(self.model, plan.stop)))

    def start(self, plan: Plan, steps: int, work: Pass | None) -> Pass | None:
        """Begin so many steps, for which the rows have pages; None where they cannot be recorded.

        work: what is not waited for, if anything. Behind it, None also where there is no record yet, or the host has a
        part in choosing.
        """
        wanted = self._key(plan, steps)
        key = self._serving(wanted)
        if work is not None and (key is None or plan.how is None):
            return None
        key = key or wanted
        record = self._record(key)
        self._seen[wanted] += 1
        if record is None:
            return None
        (found, how), rows = key, plan.rows
        state, lines = self._states[found], [row.sequence for row in rows if row.samples]
        state.place(rows, steps, how or ())
        if work is not None:
            carry(work, rows, state.at["ids"])

        def chosen(logits: Tensor | None) -> Choosing:
            if logits is None:
                return Choosing([line.request.sampling for line in lines], state.said[0, : len(lines)], ())
            logits = logits[: len(lines)].to(torch.promote_types(logits.dtype, torch.float32))
            return self._sampler.choose(logits, lines)

        if self.stage is not None:
            return self.stage.recorded(rows, state.entering, record, chosen)
        if how is None:
            return Single(lines, chosen(record()))
        start = Moment(self._read.device)
        for _ in range(steps):
            record()
        return Burst(lines, state.said[:steps, : len(lines)], start, partial(self._seconds.__setitem__, key))

    def prepare(self, places: int, stop: int, budget: int, how: Columns | None) -> None:
        """Record ahead what serves up to so many sequences of up to `stop` tokens, in passes of up to `budget`.

        One record for each number of tokens, of as many places as can meet in it, and steps of every number of places;
        the largest first, in whose memory the others find room.
        """
        if obstacle(self.model) is not None:
            return
        self._stay()
        pages, places = self._pages(stop + 1), min(places, PLACES)
        self._make((shape(max(sizes(budget)), 1, pages), ()))  # a piece of a long prompt, behind which nobody chooses
        for tokens in reversed(sizes(budget)):
            self._make((shape(tokens, min(places, tokens), pages), how))
        for i in range(places.bit_length(), -1, -1):
            self._make((shape(0, min(2**i, places), pages), how))

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.kept.pools.page_size)

    def _key(self, plan: Plan, steps: int) -> Key:
        pages = self._pages(plan.stop + steps)  # the last step prepares one that may not come
        return shape(plan.tokens, len(plan.rows), pages), plan.how

    def _stay(self) -> None:
        """Forget the records of pools that have moved."""
        if self._read is not self.kept.pools.layers[0][0]:
            self.forget()

    def _serving(self, wanted: Key) -> Key | None:
        """The record that serves: its own, or, for a shape that has not come up often, the smallest of those larger."""
        self._stay()
        if wanted in self._records:
            return wanted
        if self._seen[wanted] >= PATIENCE:
            return None
        needed, how = wanted
        serving = [other for other in self._records if other[1] == how and other[0].holds(needed)]
        return min(serving, key=lambda other: (other[0].places, other[0].pages), default=None)

    def _record(self, key: Key) -> Callable[[], Tensor | None] | None:
        if self._seen[key] or not key[0].tokens:
            self._make(key)
        return self._records.get(key)

    def _make(self, key: Key) -> None:
        if key in self._records or key in self._refused:
            return
        try:
            self._records[key] = self._recorder.record(self._work(*key))
        except Unrecordable as error:
            self._refused[key] = str(error)
        self._agree(key)

    def _agree(self, key: Key) -> None:
        """What one of several ranks could not record, none replays."""
        over = self.model.place.over
        if over is None:
            return
        recorded = torch.tensor([key in self._records], device=self._read.device)
        if not bool(over.all_gather(recorded.int()).all()) and self._records.pop(key, None) is not None:
            self._refused[key] = "another rank could not record it"

    def _work(self, s: Shape, how: Columns | None) -> Callable[[], Tensor | None]:
        if s not in self._states:
            room = s.places, s.pages, self.kept
            self._states[s] = Runs(s.tokens, *room) if s.tokens else Steps(*room)
        state = self._states[s]
        state.place([], 0, ())  # recording may do the work, which then leaves the pages alone
        if not self.model.place.first and state.entering is None:
            like = self.model.like
            state.entering = like.new_zeros(len(state.positions), self.model.tower.width)
        if not self.model.place.last:
            return partial(state.run, self.model)
        return partial(state.logits, self.model) if how is None else partial(state.step, self.model, how)


def shape(tokens: int, places: int, pages: int) -> Shape:
    """The least that holds so many places and pages, of those that `TIMES` has."""
    more_places, more_pages = next(times for most, times in TIMES.items() if tokens <= most)
    places = _next(places, 1, more_places)
    least = PAGES if places <= 16 and tokens <= 256 else MORE_PAGES
    return Shape(tokens, places, _next(pages, least, more_pages))


def obstacle(model: Transformer) -> str | None:
    """Why passes of the model cannot be recorded, or None."""
    positions = [b.attention.position for b in model.tower.blocks]
    if any(isinstance(getattr(p, "scaling", None), Dynamic | LongRope) for p in positions):
        return "the rotary embedding depends on the length of each sequence"
    if any(isinstance(p, Alibi) and p.bf16 for p in positions):
        return "alibi is rounded to bfloat16"
    if model.backends:
        return f"{len(model.backends)} blocks fell back to another backend"
    return None


def _room(model: Transformer, stop: int) -> int:
    """Steps that a table of absolute positions leaves a sequence of `stop` tokens, the last of which is next."""
    e = model.tower.embed
    assert isinstance(e, Tokens), "the runner has refused other towers"
    return MOST if e.positions is None else e.positions - e.position_offset - stop + 1


def _next(n: int, first: int, times: int) -> int:
    """The least of `first` and what comes of multiplying it that is not less than n."""
    while first < n:
        first *= times
    return first
