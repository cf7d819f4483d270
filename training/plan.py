"""What decides a training run, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field

WARM_UP, DECAY = 0.02, 0.5  # fractions of the budget: the rate rises, stays, and falls to zero along a line


@dataclass(frozen=True, slots=True)
class Plan:
    """What decides the run. The budget is used up when either of minutes and tokens is."""

    minutes: float
    tokens: float
    length: int  # of a row, in tokens
    batch: int  # rows per step
    seed: int
    matrix_rate: float
    vector_rate: float
    weight_decay: float
    dropout: float  # of the embeddings and of what every branch adds to them
    evaluate_every: int  # steps
    validation_rows: int  # at most; they are spread over the validation split
    save_every: float  # minutes
    width: int
    layers: int  # at the start
    grown: int  # layers at the end: a multiple of the layers at the start
    grow_at: float  # fraction of the budget


@dataclass(slots=True)
class Progress:
    """How far the run is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)

    def fraction(self, plan: Plan) -> float:
        """The part of the budget that is used up."""
        return max(self.seconds / 60 / plan.minutes, self.tokens / plan.tokens)

    def last(self) -> dict[str, float]:
        """The losses that were noted last."""
        return {name: self.log[-1][name] for name in ("loss", "validation")} if self.log else {}


def rate(fraction: float) -> float:
    """The learning rate after that part of the budget, as a part of its peak."""
    return min(1.0, fraction / WARM_UP + 1e-3, (1 - fraction) / DECAY)
