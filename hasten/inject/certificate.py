"""Proof that a fused model computes what the original does, measured on this machine, with the weights there are.

Each block is run fused, by the references in the model's dtype, and by the references in a wider dtype, on the same
input. The wide run is the truth; what the references lose against it is what the dtype costs, and the yardstick for the
fused block. A block that loses more falls back to the references. Then the whole model is compared with the original:
where the original itself is nearer to the truth than the fused model by more than the tolerance, the backbone gives way
to the model's own forward. Either is said in the certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.inject.backbone import Backbone
from hasten.inject.probe import probe
from hasten.inject.requests import check_tensors
from hasten.inject.watch import BlockReport, OutputReport, Watch

if TYPE_CHECKING:
    from hasten.inject.engine import InferenceEngine

SETTINGS = ("inputs", "seed", "factor")
FACTOR = 2.0  # how often the yardstick a fused block may lose: other orders of summation lose differently


@dataclass(frozen=True, slots=True)
class Certificate:
    """What `certify` found. `passed`: the fused model is within tolerance, after the fall-backs that it lists."""

    model: str
    dtype: str
    blocks: tuple[BlockReport, ...]
    outputs: tuple[OutputReport, ...]
    max_error: float  # of the model's first output, fused against original
    kl: float  # nats, mean over tokens, original against fused
    agreement: float  # share of tokens whose largest output is the same
    passed: bool

    @property
    def fallbacks(self) -> tuple[str, ...]:
        blocks = [f"{b.tower} block {b.index}: references" for b in self.blocks if b.fell_back]
        return (*blocks, *(f"{o.tower}: the model's own forward" for o in self.outputs if o.gave_way))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"fallbacks": list(self.fallbacks)}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def certify(
    engine: InferenceEngine, *, inputs: Mapping[str, Tensor] | None = None, seed: int = 0, factor: float = FACTOR
) -> Certificate:
    """Compare the engine's model with the original on `inputs` (keyword arguments of its forward) or random ones.

    factor: how many times the yardstick a fused block may lose. Blocks and backbones that lose more have fallen back
    when this returns. Raises ConfigError for an engine without fused backbones.
    """
    if not engine.backbones:
        raise ConfigError("nothing to certify: no backbone is fused (replace_with_kernel_inject=False)")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise ConfigError(f"certify: factor must be positive, got {factor!r}")
    given = dict(inputs) if inputs is not None else probe(engine.module, engine.backbones, seed)
    check_tensors(given, engine.backbones)
    with torch.inference_mode():
        watches = [Watch(b, factor, _seen(b, given)) for b in engine.backbones]
        with _watching(watches, bypass=True):
            call, original = _original(engine, given, inputs is None)
        with _watching(watches):
            fused = call()
        if any(w.fallen for w in watches):  # what the fallen blocks give now
            with _watching(watches, measure=False):
                fused = call()
        outputs = tuple(w.output() for w in watches if w.truth is not None)
        if any(o.gave_way for o in outputs):
            fused = call()
        return _certificate(engine, watches, outputs, fused, original)


def _original(
    engine: InferenceEngine, given: Mapping[str, Tensor], random: bool
) -> tuple[Callable[[], Tensor], Tensor]:
    """What to call, and the first output of it by the model's own forward.

    It is the whole model; its backbone where the model wants more than random inputs can be (choices, spans, labels).
    """
    options = _no_cache(engine)
    try:
        return (lambda: _first(engine.module(**given, **options))), _first(engine.module(**given, **options))
    except (TypeError, ValueError, RuntimeError, IndexError):
        if not random or len(engine.backbones) > 1:
            raise
    backbone = engine.backbones[0].module
    return (lambda: _first(backbone(**given, **options))), _first(backbone(**given, **options))


def settings(asked: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """The keyword arguments of `certify` that the option `certify` asks for; None if it asks for nothing."""
    if not isinstance(asked, Mapping):
        return {} if asked else None
    unknown = [name for name in asked if name not in SETTINGS]
    if unknown:
        raise ConfigError(f"certify has no setting {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    return dict(asked)


@contextmanager
def _watching(watches: list[Watch], *, measure: bool = True, bypass: bool = False) -> Iterator[None]:
    for w in watches:
        w.b.watch, w.measures = w, measure and not bypass
        w.b.bypass = "the certificate compares with it" if bypass else None
    try:
        yield
    finally:
        for w in watches:
            w.b.watch, w.b.bypass = None, None


def _certificate(
    engine: InferenceEngine, watches: list[Watch], outputs: tuple[OutputReport, ...], fused: Tensor, original: Tensor
) -> Certificate:
    a, b = fused.double(), original.double()
    seen = watches[-1].seen
    if seen is not None and seen.shape == a.shape[:2]:
        a, b = a[seen], b[seen]
    kl = (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1).mean()
    agreement = (a.argmax(-1) == b.argmax(-1)).double().mean()
    passed = bool(torch.isfinite(a).all()) and not any(o.gave_way for o in outputs)
    return Certificate(
        model=type(engine.module).__name__,
        dtype=str(fused.dtype).removeprefix("torch."),
        blocks=tuple(r for w in watches for r in w.reports),
        outputs=outputs,
        max_error=float((a - b).abs().max()),
        kl=max(0.0, float(kl)),
        agreement=float(agreement),
        passed=passed,
    )


def _seen(b: Backbone, given: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens of a backbone's input are no padding, as far as the inputs say."""
    mask = given.get("decoder_attention_mask" if b.seam.kind == "seq2seq-decoder" else "attention_mask")
    return None if mask is None or mask.ndim != 2 else mask.bool()


def _first(output: Any) -> Tensor:
    """The first floating tensor of a model's output: logits, or hidden states."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 0)


def _no_cache(engine: InferenceEngine) -> dict[str, Any]:
    cached = any(b.seam.kind in ("decoder", "seq2seq-decoder") for b in engine.backbones)
    return {"use_cache": False} if cached else {}


def _lines(c: Certificate) -> Iterator[str]:
    yield f"certificate of {c.model} in {c.dtype}: {'passed' if c.passed else 'FAILED'}"
    for o in c.outputs:
        yield f"  {o.tower}: error {o.fused:.1e}, the original's own {o.original:.1e}, allowed {o.allowed:.1e}"
        mine = [b for b in c.blocks if b.tower == o.tower]
        worst = max(mine, key=lambda b: b.fused / b.allowed)
        yield (
            f"    {len(mine)} blocks; nearest to its limit is block {worst.index}: "
            f"error {worst.fused:.1e}, references {worst.reference:.1e}, allowed {worst.allowed:.1e}"
        )
    yield f"  outputs: largest difference {c.max_error:.1e}, KL {c.kl:.1e} nats, same argmax {c.agreement:.2%}"
    yield from (f"  fell back: {f}" for f in c.fallbacks)
