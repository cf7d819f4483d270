"""The engine: the user's model, served by fused backbones, and everything there is to ask about it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hasten.errors import ConfigError, RequestError
from hasten.inject.backbone import Backbone
from hasten.inject.cast import Cast
from hasten.inject.options import Options

if TYPE_CHECKING:
    from hasten.inject.certificate import Certificate
    from hasten.inject.explain import Explanation


class InferenceEngine(nn.Module):
    """Calls, `generate` and every attribute that it does not define go to `module`, the user's own model."""

    def __init__(self, module: nn.Module, options: Options, backbones: list[Backbone], cast: Cast) -> None:
        super().__init__()
        self.module, self.options, self.backbones, self.cast = module, options, backbones, cast
        self.certificate: Certificate | None = None
        self.notes: list[str] = list(options.notes)
        self._trained = [m for m in module.modules() if m.training]
        self._times: list[float] | None = None
        self._generator: Any = None
        self.live = False
        self._config = getattr(module, "config", None)

    def start(self) -> None:
        """Put the model into eval, cast it, and install the backbones; if that fails, the model is as it was."""
        installed: list[Backbone] = []
        try:
            self._to_eval()
            self.cast.apply()
            for b in self.backbones:
                installed.append(b)
                b.install(self.options.backend)
        except BaseException:
            for b in reversed(installed):
                b.remove()
            self.cast.undo()
            self._to_train()
            raise
        self.live = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._check_live()
        with self._timed():
            return self.module(*args, **kwargs)

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
        self._close()
        for b in reversed(self.backbones):
            b.remove()
        self.cast.undo()
        self._to_train()
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
        dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self._trained)
        if self._trained:
            self.module.eval()
            self.notes.append(
                f"{len(self._trained)} modules were in training mode{' with dropout' if dropout else ''}; the model has "
                "been put into eval, and revert() puts it back"
            )

    def _to_train(self) -> None:
        for m in self._trained:
            m.training = True

    def _close(self) -> None:
        if self._generator is not None:
            self._generator.close()
            self._generator = None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if self._times is None:
            yield
            return
        wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
        wait()
        start = time.perf_counter()
        yield
        wait()
        self._times.append((time.perf_counter() - start) * 1e3)
