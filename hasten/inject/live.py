"""A live model's `generate`: transformers' own, whose loop native generation replaces where it gives the same.

Everything before the loop and all that the loop would not do natively is transformers'. Sampled tokens are drawn from
the same distribution as transformers', by other numbers, which torch's seed governs too: on a CPU they are left alone.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import GenerationConfig

from hasten.errors import RequestError
from hasten.inject.backbone import foreign
from hasten.inject.decoding import (
    Declined,
    Prompts,
    check_arguments,
    check_config,
    read_prompts,
    read_sampling,
)
from hasten.inject.joining import share_draws
from hasten.inject.native import Native
from hasten.runtime import Sampling
from hasten.spec import Dynamic, LongRope, Tokens

HANDLED = frozenset({"inputs", "input_ids", "attention_mask", "generation_config", "logits_processor"})
HANDLED |= {"stopping_criteria", "streamer", "tokenizer"} | set(vars(GenerationConfig()))
"""Arguments of generate() that transformers turns into what is read here."""

OWN = ("forward", "prepare_inputs_for_generation", "_sample")
"""Methods of transformers' that native generation stands for."""


class LiveGenerate:
    """Answers `generate` of `model` between `install` and `remove`, natively where that is the same."""

    def __init__(self, model: nn.Module, native: Native) -> None:
        self.model, self.native = model, native
        self.served = 0  # calls that were answered natively
        self.loops: Counter[str] = Counter()  # reason: calls that transformers' loop answered

    def install(self) -> None:
        """Take `generate` over, unless the user has put another one there."""
        self.model.__dict__.setdefault("generate", self.generate)  # a bound method: a copy takes its own along

    @property
    def installed(self) -> bool:
        """Whether it answers now."""
        return vars(self.model).get("generate") == self.generate

    def remove(self) -> None:
        if self.installed:
            del self.model.__dict__["generate"]
        self.native.close()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' GenerationMixin.generate."""
        division = self.native.backbone.division
        if division is not None:
            share_draws(division.everyone)
        theirs = partial(type(self.model).generate, self.model)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            given = self._given(theirs, args, kwargs)
            answer = theirs(**given | {"streamer": None, "custom_generate": partial(self._decode, given)})
        except Declined as why:
            answer = why
        if isinstance(answer, Declined):
            self.loops[str(answer)] += 1
            return theirs(*args, **kwargs)
        self.served += 1
        return answer

    def _given(self, theirs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name; Declined as far as they alone show that the loop has to answer."""
        self._check_model()
        names = list(inspect.signature(theirs).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) + len(kwargs) > len(given):
            raise Declined("an argument was given twice")
        for name, value in given.items():
            if name not in HANDLED and value is not None and value is not False:
                raise Declined(f"{name} was given")
        config = given.get("generation_config")
        sources = [config, getattr(self.model, "generation_config", None)]
        check_config(partial(_setting, given, [s for s in sources if s is not None]), self._device)
        return given

    def _check_model(self) -> None:
        """Declined unless every call of the model would be the fused backbone's and the head's, and nobody looked."""
        b, kind = self.native.backbone, type(self.model)
        why = b.unfit({}, frozenset())
        if why is not None or b.watch is not None:
            raise Declined(why or "the certificate watches")
        for name in OWN:
            if name in vars(self.model) or not _transformers_own(kind, name):
                raise Declined(f"{name} of {kind.__name__} is not transformers' own")
        head = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        divided = b.vocabulary is not None  # then its forward is ours
        if type(head) is not nn.Linear or ("forward" in vars(head) and not divided):
            raise Declined("the head is no plain linear layer")
        hooks = [h for m in self.model.modules() for h in (m._forward_hooks, m._forward_pre_hooks) if h]
        if any(foreign(f) for h in hooks for f in h.values()):
            raise Declined("forward hooks")

    def _decode(
        self,
        given: Mapping[str, Any],
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | Declined:
        """In place of transformers' loop: (batch, tokens) int64, or why it cannot be. Called with all prepared."""
        try:
            check_config(partial(getattr, generation_config), self._device)
            check_arguments(model_kwargs)
            prompts = read_prompts(input_ids, model_kwargs.get("attention_mask"))
            how = read_sampling(generation_config, logits_processor, stopping_criteria, prompts)
            self._check_positions(prompts, how)
            if prompts.padded:
                self._check_padding(input_ids, model_kwargs)
            streamer = given.get("streamer")
            if streamer is not None and len(input_ids) > 1:
                raise Declined("a streamer for several rows")
            made = self._run(prompts, how, _Voice(streamer, input_ids))
        except Declined as why:
            return why
        pad: Any = generation_config._pad_token_tensor  # pyright: ignore[reportAttributeAccessIssue]
        longest = max(map(len, made))
        rows = [row + [int(pad)] * (longest - len(row)) if len(row) < longest else row for row in made]
        return torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], 1)

    def _check_positions(self, prompts: Prompts, how: Sampling) -> None:
        """Declined where a row's positions would not be the ones that transformers gives it."""
        t = self.native.backbone.tower
        e, total = t.embed, prompts.width + how.max_new_tokens
        assert isinstance(e, Tokens)
        limit, rows = self.native.limit, None if e.positions is None else e.positions - e.position_offset
        if limit is not None and total > limit:
            raise Declined("more tokens than max_out_tokens")
        if rows is not None and total > rows:
            raise Declined("more tokens than the model's table of positions has")
        if any(_shared(getattr(b.attention.position, "scaling", None), prompts, total) for b in t.blocks):
            raise Declined("positions that scale with other rows or calls")
        if e.counted == "ids":
            raise Declined("positions that ids decide")

    def _check_padding(self, ids: Tensor, given: dict[str, Any]) -> None:
        """Declined unless the loop hides padding from the model, and counts positions without it."""
        prepare: Any = self.model.prepare_inputs_for_generation
        if "cache_position" in inspect.signature(prepare).parameters:
            given = {"cache_position": torch.arange(ids.shape[1], device=ids.device)} | given
        inputs, e = prepare(ids, **given), self.native.backbone.tower.embed
        assert isinstance(e, Tokens)
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is None or mask.shape != ids.shape:
            raise Declined("padding that the model sees")
        seen = mask != 0
        if positions is None:
            stripped = e.positions is None or e.counted == "mask"
        else:
            stripped = torch.equal(positions[seen], (seen.long().cumsum(1) - 1)[seen])
        if not stripped:
            raise Declined("positions that count padding")

    def _run(self, prompts: Prompts, how: Sampling, voice: _Voice) -> list[list[int]]:
        """The tokens behind each prompt. Declined if there is no room for them, or somebody else generates."""
        made: list[list[int]] = [[] for _ in prompts.rows]
        if not self.native.lock.acquire(blocking=False):
            raise Declined("another thread generates natively")
        try:
            if self.native.streams:
                raise Declined("a native stream is open")
            with torch.inference_mode():
                for event in self.native.tokens(prompts.rows, how):
                    if event.token is None:
                        raise Declined("keys and values do not fit into the memory there is")
                    made[event.index].append(event.token)
                    voice.say(event.token)
        except RequestError as refusal:
            if voice.spoke:
                raise
            raise Declined("native generation refuses the request") from refusal
        finally:
            self.native.lock.release()
        voice.end()
        return made

    @property
    def _device(self) -> torch.device:
        return self.native.backbone.transformer.like.device


class _Voice:
    """Tells a streamer what transformers' loop would: the prompt (1, tokens), then each token (1,)."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer, self.prompt, self.spoke = streamer, prompt, False

    def say(self, token: int) -> None:
        if self.streamer is not None:
            if not self.spoke:
                self.streamer.put(self.prompt.cpu())
            self.spoke = True
            self.streamer.put(torch.tensor([token]))

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def _setting(given: Mapping[str, Any], configs: list[Any], name: str) -> Any:
    """A setting as the call gives it, else as the first config that has one does."""
    values = [given.get(name), *(getattr(c, name, None) for c in configs)]
    return next((v for v in values if v is not None), None)


def _shared(scaling: Any, prompts: Prompts, total: int) -> bool:
    """Whether transformers scales positions of up to `total` tokens by more than a row's own length."""
    match scaling:
        case Dynamic():
            return total > scaling.original
        case LongRope():
            return total > scaling.original and (prompts.padded or prompts.width <= scaling.original)
        case _:
            return False


def _transformers_own(kind: type[Any], name: str) -> bool:
    return (getattr(getattr(kind, name, None), "__module__", "") or "").startswith("transformers.")
