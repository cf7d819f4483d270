"""Text out of tokens as they come: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

BROKEN = "\ufffd"  # what a tokenizer decodes an unfinished character to
CONTEXT = 6
"""Tokens before the new ones that are decoded with them, since a token's text depends on its neighbours."""


class Tokenizer(Protocol):
    """What is needed of transformers' tokenizers, or of anybody's."""

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """The text of one sequence behind its prompt. What `push` and `flush` return adds up to the decoded whole.

    The text of tokens[start:] is decoded anew each time, and what it has more than tokens[start:done] is new: how a
    tokenizer joins words and drops the first space comes out right without knowing its rules.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT:])
        self._start, self._done = 0, len(self._tokens)

    def push(self, token: int) -> str:
        """What became certain with this token."""
        self._tokens.append(token)
        before, now = self._text(self._done), self._text(len(self._tokens))
        return "" if now.endswith(BROKEN) else self._take(before, now)

    def flush(self) -> str:
        """What was held back; the beginning of a character that will not be finished is left out."""
        return self._take(self._text(self._done), self._text(len(self._tokens)).rstrip(BROKEN))

    def _text(self, stop: int) -> str:
        tokens = self._tokens[self._start : stop]
        return self._tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""

    def _take(self, before: str, now: str) -> str:
        common = len(before.rstrip(BROKEN)) if not now.startswith(before) else len(before)
        self._start, self._done = max(self._done - CONTEXT, self._start), len(self._tokens)
        return now[common:]


class Stops:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What is certain to lie before any stop string; nothing more once one was found."""
        if self.found:
            return ""
        self._held += text
        hits = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if hits:
            self.found = True
            out, self._held = self._held[: min(hits)], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


class Voice:
    """What one completion says: its tokens' text up to a stop string. `stops`: whether one can come."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenizer, self._stops = Detokenizer(tokenizer, prompt), Stops(stops)
        self.stops = bool(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._stops.found

    def say(self, token: int) -> str:
        return self._stops.push(self._detokenizer.push(token))

    def end(self) -> str:
        """The rest, when no more tokens come."""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()
