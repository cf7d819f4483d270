"""Everything Hasten raises on purpose.

    HastenError
    ├── ConfigError       (ValueError)           an option, keyword or model config that Hasten cannot follow
    ├── WeightError       (ValueError)           tensors missing, left over, not finite, of another shape or dtype
    ├── UnsupportedModel  (NotImplementedError)  a sound model that Hasten has no description or policy for
    └── RequestError      (ValueError)           one call's prompt, shapes or sampling values

The builtin second base is what callers of `transformers` and DeepSpeed already catch. A message names the thing,
what was found, what would be accepted and where it came from; where there are several problems it lists all of them.
"""

from __future__ import annotations


class HastenError(Exception):
    """Base of every error below: `except HastenError` catches what Hasten refuses and no bug."""


class ConfigError(HastenError, ValueError):
    """An option, keyword argument or model config cannot be followed; nothing has been changed."""


class WeightError(HastenError, ValueError):
    """Stored tensors contradict the model's description; nothing has been changed."""


class UnsupportedModel(HastenError, NotImplementedError):
    """No description covers this architecture; the message says what would make it work."""


class RequestError(HastenError, ValueError):
    """One request is invalid; other requests and the engine are unaffected."""
