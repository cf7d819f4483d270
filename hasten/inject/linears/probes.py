"""Inputs that exercise a model of which nothing is known but itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import UnsupportedModel
from hasten.inject.linears.matrices import inputs, linears

LENGTHS = ((11, 6), (5, 3))  # tokens of the two probes; shorter ones for models with few positions
ROWS = 2


NEW = 4  # tokens that a language model goes on by


@dataclass(frozen=True, slots=True)
class Probe:
    """Arguments of the model's forward. new: if not 0, a language model goes on by so many greedy tokens instead."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    new: int = 0

    def run(self, model: nn.Module) -> list[Tensor]:
        """The tensors in what the model returns, in its order; or the tokens, and the logits they were chosen by."""
        own = self.fitted(model)
        with torch.no_grad():
            return _continued(model, own) if self.new else tensors(model(*own.args, **own.kwargs))

    def fitted(self, model: nn.Module) -> Probe:
        """On the device of the model, and in its dtype."""
        first = next(model.parameters())

        def moved(t: Any) -> Any:
            return t.to(first.device, first.dtype if t.is_floating_point() else None) if isinstance(t, Tensor) else t

        return replace(self, args=tuple(map(moved, self.args)), kwargs={n: moved(t) for n, t in self.kwargs.items()})


def tensors(output: Any) -> list[Tensor]:
    """The tensors in what a model returns, in its order."""
    match output:
        case Tensor():
            return [output]
        case Mapping():
            return [t for v in output.values() for t in tensors(v)]
        case list() | tuple():
            return [t for v in output for t in tensors(v)]
        case _:
            return []


def main(output: Any) -> Any:
    """Of what a module returns, the part that ranks sum: all, or the first of several."""
    return output[0] if isinstance(output, tuple) and output else output


def instead(output: Any, t: Tensor) -> Any:
    """What a module returns, with another tensor for `main`."""
    return (t, *output[1:]) if isinstance(output, tuple) and output else t


def probes(model: nn.Module) -> tuple[Probe, ...]:
    """Two probes of different sizes that the model takes, and one that it goes on by, if it can.

    Raises UnsupportedModel if none is found.
    """
    failures: list[str] = []
    for pair in _pairs(model):
        try:
            for probe in pair:
                probe.run(model)
            return (*pair, *_going_on(model, pair[0]))
        except Exception as error:
            failures.append(f"{_shown(pair[0])}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    name = type(model).__name__
    raise UnsupportedModel(
        f"no inputs are known that {name} takes, so that nothing can be verified: give it an attribute `dummy_inputs`, "
        "a dict of its forward's keyword tensors (tried: " + ("; ".join(failures) or "nothing") + ")"
    )


def _going_on(model: Any, probe: Probe) -> list[Probe]:
    can, further = getattr(model, "can_generate", None), replace(probe, new=NEW)
    if "input_ids" not in probe.kwargs or not callable(can) or not can():
        return []
    try:
        further.run(model)
    except Exception:  # it takes more than tokens to go on
        return []
    return [further]


def _continued(model: Any, probe: Probe) -> list[Tensor]:
    """Greedy tokens (rows, new), then the logits of each (rows, vocabulary); with the model's cache."""
    how, ids = copy.deepcopy(model.generation_config), probe.kwargs["input_ids"]
    how.update(
        max_new_tokens=probe.new, max_length=None, do_sample=False, num_beams=1, return_dict_in_generate=True,
        output_logits=True, use_cache=True, pad_token_id=0 if how.pad_token_id is None else how.pad_token_id,
    )  # fmt: skip
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return [made.sequences[:, -len(made.logits) :], *made.logits]


def _pairs(model: nn.Module) -> Iterator[list[Probe]]:
    """Pairs to try in turn: what the model says itself, then tokens, images and features of likely sizes."""
    draw = torch.Generator().manual_seed(0)
    settled = _settled(model)
    main = getattr(model, "main_input_name", None)
    own = vars(model).get("dummy_inputs") or vars(type(model)).get("dummy_inputs")
    if own is not None:
        given: Any = getattr(model, "dummy_inputs", own)
        yield [Probe((), {**x, **settled}) for x in (given, _less(given))]
    if main in (None, "input_ids"):
        for vocabulary in _vocabularies(model):
            for lengths in LENGTHS:
                yield [_tokens(model, torch.randint(vocabulary, (ROWS, n), generator=draw), main) for n in lengths]
    if main in (None, "pixel_values"):
        images = _images(model, draw)
        if images is not None:
            yield [_call(model, x, main) for x in (images, images[:1])]
    first = next(iter(linears(model).values()), None)
    if first is not None and main is None:
        for lengths in LENGTHS:
            yield [_call(model, torch.randn(ROWS, n, inputs(first), generator=draw), None) for n in lengths]


def _tokens(model: nn.Module, ids: Tensor, main: str | None) -> Probe:
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return _call(model, ids, main, **({"decoder_input_ids": ids.flip(1)} if both else {}))


def _call(model: nn.Module, value: Tensor, main: str | None, **more: Tensor) -> Probe:
    """A value as the argument of that name, or as the first."""
    kwargs = {**more, **_settled(model)}
    return Probe((value,), kwargs) if main is None else Probe((), {main: value, **kwargs})


def _settled(model: nn.Module) -> dict[str, Any]:
    """What a transformers model is told besides: that nobody wants its cache, whose parts are a rank's own."""
    return {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) else {}


def _vocabularies(model: nn.Module) -> list[int]:
    """Numbers of rows of the model's tables; the one that transformers names, else the largest first."""
    try:
        return [model.get_input_embeddings().num_embeddings]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    except (AttributeError, NotImplementedError):
        return sorted({m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}, reverse=True)


def _images(model: nn.Module, draw: torch.Generator) -> Tensor | None:
    config: Any = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(ROWS, getattr(config, "num_channels", 3), height, width, generator=draw)


def _less(given: Mapping[str, Any]) -> dict[str, Any]:
    """The first row of each tensor; where all have equally many columns, the first half of these."""
    tensors = {n: t for n, t in given.items() if isinstance(t, Tensor)}
    columns = {t.shape[1] if t.ndim > 1 else 0 for t in tensors.values()}
    half = max(next(iter(columns)) // 2, 1) if len(columns) == 1 and 0 not in columns else None
    return {**given, **{n: t[:1] if half is None else t[:1, :half] for n, t in tensors.items()}}


def _shown(probe: Probe) -> str:
    shapes = {**dict(enumerate(probe.args)), **probe.kwargs}
    return ", ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in shapes.items() if isinstance(t, Tensor))
