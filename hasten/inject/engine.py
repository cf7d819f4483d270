"""The engine: the user's model, served by fused backbones, and everything there is to ask about it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.errors import ConfigError, RequestError
from hasten.inject.ahead import checked
from hasten.inject.backbone import Backbone
from hasten.inject.cast import Cast
from hasten.inject.joining import Division, in_step, share_draws
from hasten.inject.linears import Linears
from hasten.inject.live import LiveGenerate
from hasten.inject.native import Native
from hasten.inject.options import Options
from hasten.inject.requests import begin_checks, check_lengths, check_limit, check_tensors, is_prompts
from hasten.inject.requests import sampling as sampling_of
from hasten.runtime import Event, Generation, Sampling

if TYPE_CHECKING:
    from hasten.inject.certificate import Certificate
    from hasten.inject.explain import Explanation


class InferenceEngine(nn.Module):
    """Calls, `generate` and every attribute that it does not define go to `module`, the user's own model."""

    def __init__(
        self,
        module: nn.Module,
        options: Options,
        backbones: list[Backbone],
        cast: Cast,
        division: Division | None = None,
        linears: Linears | None = None,
    ) -> None:
        super().__init__()
        self.division, self.linears = division, linears
        self.module, self.options, self.backbones, self.cast = module, options, backbones, cast
        self.certificate: Certificate | None = None
        self.notes: list[str] = [*options.notes, *(() if linears is None else linears.found.notes)]
        self._trained = [m for m in module.modules() if m.training]
        self._times: list[float] | None = None
        self.generating = self._generating()
        self.live = False
        self._config = getattr(module, "config", None)

    def start(self, shares: Mapping[tuple[str, ...], Tensor] | None = None) -> None:
        """Put the model into eval, cast it, and install the backbones; if that fails, the model is as it was.

        shares: what this rank has read of parameters that ranks divide, by their names in the model.
        """
        group = None if self.division is None else self.division.everyone
        for b in self.backbones:
            b.lend(self.division, shares)
        try:
            with in_step(group, self._where, "taking a share of the model"):
                self._install()
            if self.linears is not None:
                self.linears.install()
        except BaseException:
            self._remove()
            raise
        self.live = True

    def _install(self) -> None:
        self._to_eval()
        self.cast.apply()
        for b in self.backbones:
            b.install(self.options.backend, graphs=self._graphs, skip_padding=self.options.skip_padding)
        if self.generating is not None:
            self.generating.install()

    def _remove(self) -> None:
        if self.generating is not None:
            self.generating.remove()
        for b in reversed(self.backbones):
            b.remove()
        self.cast.undo()
        self._to_train()

    @property
    def _where(self) -> torch.device:
        """Where ranks exchange what they say."""
        own = None if self.division is None else self.division.device
        return own or self.cast.device or next(self.module.parameters()).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, on the fused backbones; token ids are checked, and wrong ones have no answer."""
        self._check_live()
        given = {"input_ids": args[0], **kwargs} if args else kwargs
        model = self._modules["module"]  # not by __getattr__, for the time
        assert model is not None
        early = next((b.guess(args, kwargs, True) for b in self.backbones if b.module is model), nullcontext())
        with self._timed(), early, checked(begin_checks(given, self.backbones)):
            return model(*args, **kwargs)

    def generate(
        self, inputs: Any = None, sampling: Sampling | Sequence[Sampling] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Generate text.

        inputs a tensor (batch, tokens), or no inputs but keyword tensors: transformers' `generate`, with its own
        arguments and result, on the fused backbone.

        inputs a list of prompts (token ids of any lengths, or strings where a `tokenizer` is given): native generation.
        `sampling`, one or one each, or the fields of Sampling as keywords, say how; `stream=True` gives an iterator of
        Events instead of a list of Generations. Greedy unless a temperature is given.
        """
        self._check_live()
        if is_prompts(inputs):
            return self._generate_natively(inputs, sampling, **kwargs)
        given = {**({} if inputs is None else {"inputs": inputs}), **kwargs}
        check_tensors(given, self.backbones)
        check_lengths(given)
        ids = given.get("inputs", given.get("input_ids"))
        length = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.ndim > 1 and not self._speaks_apart else 0
        check_limit(given, given.get("generation_config") or self.module.generation_config, self._limit, length)
        positional = () if sampling is None else (sampling, *args)  # transformers' generation_config and what follows
        model: Any = self.module
        answers = self.generating is not None and self.generating.installed  # it shares them itself
        if self.division is not None and not answers:
            share_draws(self.division.everyone)
        with self._timed():
            return model.generate(*(() if inputs is None else (inputs,)), *positional, **kwargs)

    def _generate_natively(
        self,
        prompts: Any,
        how: Sampling | Sequence[Sampling] | None,
        *,
        tokenizer: Any = None,
        stream: bool = False,
        **settings: Any,
    ) -> list[Generation] | Iterator[Event]:
        if how is not None and settings:
            raise RequestError(f"generate: give either sampling or {', '.join(settings)}, not both")
        how = sampling_of(settings) if how is None else how
        native = self._native()
        if stream:
            return native.stream(prompts, how, self._ends, tokenizer)
        with self._timed():
            return native.generate(prompts, how, self._ends, tokenizer)

    def prepare(self, sequences: int, tokens: int, sampling: Sampling | None = None, *, tokenizer: Any = None) -> None:
        """Make ahead what native generation makes when it first needs it: memory for keys and values, recorded passes.

        For up to so many sequences at once, of up to so many tokens with their prompts, which choose as `sampling`
        says; tokenizer: as calls will give it. A GPU then never stops between passes; on a CPU nothing is recorded.
        """
        self._check_live()
        self._native().prepare(sequences, tokens, sampling, self._ends, tokenizer)

    @property
    def _ends(self) -> Any:
        """Token ids that end every completion, as the model's generation config has them."""
        ends = getattr(self.module.generation_config, "eos_token_id", None)
        return () if ends is None else ends

    def _native(self) -> Native:
        if self.generating is None:
            what = "no fused decoder with a language model head"
            raise RequestError(
                f"{type(self.module).__name__} has {what}: pass a tensor, which transformers' generate() takes"
            )
        native = self.generating.native
        if native.backbone.bypass is not None:
            raise RequestError(f"native generation needs the fused backbone, but {native.backbone.bypass}")
        return native

    def _generating(self) -> LiveGenerate | None:
        """What answers `generate` of the model, if it is one that native generation can serve."""
        b = self.backbones[0] if len(self.backbones) == 1 else None
        if b is None or b.seam.kind != "decoder" or b.tower.head is None:
            return None
        native = Native(b, limit=self._limit, graphs=self._graphs, invariant=self.options.batch_invariant)
        return LiveGenerate(self.module, native)

    @property
    def _graphs(self) -> bool:
        return self.options.enable_cuda_graph is not False

    @property
    def _limit(self) -> int | None:
        return self.options.max_out_tokens

    @property
    def _speaks_apart(self) -> bool:
        """Whether the prompt is an encoder's, whose tokens are not the decoder's."""
        return bool(getattr(self._config, "is_encoder_decoder", False))

    def revert(self, force: bool = False) -> nn.Module:
        """The user's model as it was before, bit for bit; the engine is over.

        Raises ConfigError, and changes nothing, after a cast that lost bits whose originals were not kept, unless
        `force`: then the model comes back in its old dtype with the values that are left.
        """
        if not self.live:
            return self.module
        if self.cast.narrowed and not force:
            raise ConfigError(
                f"revert() cannot restore {len(self.cast.narrowed)} tensors that dtype={self.options.dtype} narrowed, "
                f"{self.cast.narrowed[0]} first: pass keep_originals=True to init_inference to keep them, or "
                "revert(force=True) to take the values that are left"
            )
        if self.linears is not None:
            self.linears.remove()
        self._remove()
        self.live = False
        return self.module

    def destroy(self) -> None:
        """Give back what the engine holds besides the model; `module` works on without it."""
        self.revert(force=True)

    def profile_model_time(self, use_cuda_events: bool = True) -> None:
        """Measure every call of the engine from now on; `model_times` gives the result."""
        self._times = []

    def model_times(self) -> list[float]:
        """Milliseconds of each call since profiling began or since this was last asked."""
        if self._times is None:
            raise ConfigError("model profiling is not enabled: call engine.profile_model_time() first")
        times, self._times = self._times, []
        return times

    def explain(self) -> Explanation:
        """Every decision that was taken, as text when printed."""
        from hasten.inject.explain import explain

        return explain(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(super().__getattr__("module"), name)

    def _check_live(self) -> None:
        if not self.live:
            raise RequestError("this engine is over: revert() or destroy() was called; use the model itself")

    def _to_eval(self) -> None:
        dropout = " with dropout" if any(isinstance(m, nn.Dropout) and m.p > 0 for m in self._trained) else ""
        if self._trained:
            self.module.eval()
            self.notes.append(
                f"{len(self._trained)} modules were in training mode{dropout}; the model has been put into eval, and "
                "revert() puts it back"
            )

    def _to_train(self) -> None:
        for m in self._trained:
            m.training = True

    def _timed(self) -> AbstractContextManager[None]:
        return nullcontext() if self._times is None else self._measured(self._times)

    @contextmanager
    def _measured(self, times: list[float]) -> Iterator[None]:
        wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
        wait()
        start = time.perf_counter()
        yield
        wait()
        times.append((time.perf_counter() - start) * 1e3)
