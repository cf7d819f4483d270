"""Tokenizers small enough to see through: bytes in any portions, and words with their space in front."""

from __future__ import annotations


class Portions:
    """Token i is the i-th of `portions`, which may cut characters in two; `special` tokens have no text."""

    def __init__(self, portions: list[bytes], special: frozenset[int] = frozenset()) -> None:
        self.portions, self.special = portions, special

    def encode(self, text: str) -> list[int]:
        return [self.portions.index(bytes([b])) for b in text.encode()]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        kept = [t for t in token_ids if not (skip_special_tokens and t in self.special)]
        return b"".join(self.portions[t] for t in kept).decode(errors="replace")


class Words:
    """Every token is a word behind a space, and the first space of a text is dropped."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def encode(self, text: str) -> list[int]:
        return [self.words.index(word) for word in text.split()]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(self.words[t] for t in token_ids)
