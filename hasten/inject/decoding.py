"""What transformers' generate() has prepared for its loop, read as a request that native generation answers exactly.

transformers settles its configs, defaults, lengths and masks itself; what comes of them, logits processors and stopping
criteria, is read here one by one. A single one that is not native generation's own, and transformers' loop runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as process
from transformers.generation import stopping_criteria as stopping
from transformers.generation.configuration_utils import GenerationConfig

from hasten.errors import RequestError
from hasten.inject.hf_cache import SPELLINGS
from hasten.runtime import Sampling

PREPARED = frozenset({*SPELLINGS, "attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep"})
"""Model arguments that transformers prepares for every call."""

Reader = Callable[[Any, int], int | float]

PROCESSORS: dict[type[Any], tuple[str, Reader]] = {
    process.RepetitionPenaltyLogitsProcessor: ("repetition_penalty", lambda p, width: p.penalty),
    process.MinLengthLogitsProcessor: ("min_new_tokens", lambda p, width: p.min_length - width),
    process.MinNewTokensLengthLogitsProcessor: (
        "min_new_tokens",
        lambda p, width: p.prompt_length_to_skip + p.min_new_tokens - width,
    ),
}
"""What each means for a prompt of `width` tokens, in the order in which native generation applies them."""

WARPERS: dict[type[Any], tuple[str, Reader]] = {
    process.TemperatureLogitsWarper: ("temperature", lambda p, width: p.temperature),
    process.TopKLogitsWarper: ("top_k", lambda p, width: p.top_k),
    process.TopPLogitsWarper: ("top_p", lambda p, width: p.top_p),
    process.MinPLogitsWarper: ("min_p", lambda p, width: p.min_p),
}
"""Those of draws. min_p cuts where it is relative to the likeliest, so only top_p minds which of both comes first."""


class Declined(Exception):
    """transformers' loop has to answer, for the reason given."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The rows of ids (batch, width) without the padding on their left, which is so many tokens."""

    rows: list[list[int]]
    padding: list[int]
    width: int

    @property
    def padded(self) -> bool:
        return any(self.padding)


def check_config(setting: Callable[[str], Any], device: torch.device) -> None:
    """Raise Declined for settings, by name, that are not native generation's."""
    if (setting("num_beams") or 1) > 1:
        raise Declined("beams")
    if setting("return_dict_in_generate"):
        raise Declined("return_dict_in_generate")
    if setting("stop_strings") is not None:
        raise Declined("stop_strings")
    if setting("cache_implementation") is not None:
        raise Declined("a cache_implementation")
    if setting("prefill_chunk_size") is not None:
        raise Declined("a prefill_chunk_size")
    if setting("do_sample") and device.type != "cuda":
        raise Declined("sampling on a CPU repeats transformers' own draws")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise Declined for arguments of the model that transformers has not prepared by itself."""
    for name, value in given.items():
        if name not in PREPARED and value is not None and value is not False:
            raise Declined(f"{name} was given")


def read_prompts(ids: Tensor, mask: Tensor | None) -> Prompts:
    """The prompts of ids (batch, width) under an attention mask; Declined unless padding is on the left only."""
    rows: list[list[int]] = ids.tolist()
    if mask is None or bool((mask != 0).all()):
        return Prompts(rows, [0] * len(rows), ids.shape[1])
    if mask.shape != ids.shape:
        raise Declined("an attention_mask of another shape than the prompt")
    seen = (mask != 0).long()
    if bool((seen.diff(dim=1) < 0).any()) or not bool(seen[:, -1].all()):
        raise Declined("padding on the right or in between")
    padding = (ids.shape[1] - seen.sum(1)).tolist()
    return Prompts([row[n:] for row, n in zip(rows, padding, strict=True)], padding, ids.shape[1])


def read_sampling(
    config: GenerationConfig, processors: Iterable[Any], criteria: Iterable[Any], prompts: Prompts
) -> Sampling:
    """How transformers would choose the tokens behind the prompts."""
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise Declined(mode.replace("_", " "))
    length, ends = _stops(criteria)
    found = _settings(list(processors), mode == "sample", prompts, ends)
    new = length - prompts.width
    try:
        return Sampling(
            max_new_tokens=new,
            min_new_tokens=min(max(int(found.pop("min_new_tokens", 0)), 0), new),
            temperature=found.pop("temperature", 1.0 if mode == "sample" else 0.0),
            stop_tokens=sorted(ends),
            ignore_eos=True,  # those of the model's own config have come with the criteria
            **found,  # pyright: ignore[reportArgumentType]
        )
    except RequestError as refusal:
        raise Declined("settings outside of native generation's ranges") from refusal


def _stops(criteria: Iterable[Any]) -> tuple[int, frozenset[int]]:
    """The length at which all is over, and the tokens that end a row."""
    lengths, ends = [], set[int]()
    for c in criteria:
        if type(c) is stopping.MaxLengthCriteria:
            lengths.append(c.max_length)
        elif type(c) is stopping.EosTokenCriteria:
            ends.update(c.eos_token_id.tolist())
        else:
            raise Declined(type(c).__name__)
    if not lengths:
        raise Declined("no greatest length")
    return min(lengths), frozenset(ends)


def _settings(processors: list[Any], sampled: bool, prompts: Prompts, ends: frozenset[int]) -> dict[str, Any]:
    """Fields of Sampling, by name."""
    known, found = PROCESSORS | (WARPERS if sampled else {}), dict[str, Any]()
    order = list(known)
    for p in processors:
        if type(p) not in known or not _plain(p, prompts, ends):
            raise Declined(type(p).__name__)
        name, read = known[type(p)]
        if name in found and name != "min_new_tokens":
            raise Declined(f"{name} twice")
        value = read(p, prompts.width)
        found[name] = max(value, found.get(name, 0)) if name == "min_new_tokens" else value
    places = [order.index(type(p)) for p in processors]
    if places != sorted(places):
        raise Declined("logits processors in an order of their own")
    if "min_p" in found and "top_p" in found:
        raise Declined("top_p in front of min_p")
    return found


def _plain(p: Any, prompts: Prompts, ends: frozenset[int]) -> bool:
    """Whether a processor's other attributes are the ones that native generation implies."""
    held, skipped = getattr(p, "eos_token_id", None), prompts.padding
    if type(p) is process.RepetitionPenaltyLogitsProcessor:
        ignored = p.prompt_ignore_length
        skipped = ignored.tolist() if isinstance(ignored, Tensor) else [ignored or 0] * len(prompts.rows)
    return (
        getattr(p, "filter_value", -torch.inf) == -torch.inf
        and getattr(p, "min_tokens_to_keep", 1) == 1
        and skipped == prompts.padding
        and (held is None or frozenset(held.tolist()) == ends)
    )
