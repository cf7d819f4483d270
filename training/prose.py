"""What counts as prose: paragraphs are normalised to plain ASCII typography, then kept or dropped."""

from __future__ import annotations

import re

TYPOGRAPHY = str.maketrans(
    {
        "\u2018": "'",  # quotes
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",  # dashes
        "\u2014": " - ",
        "\u2026": "...",
        "\u00a0": " ",
        "\u00ad": "",  # soft hyphen
        "\u2192": ">",
    }
)
COMMON = frozenset(
    (
        *(
            "the",
            "of",
            "and",
            "to",
            "a",
            "in",
            "that",
            "is",
            "it",
            "for",
            "you",
            "be",
            "not",
            "with",
            "as",
            "on",
            "are",
        ),
        *("this", "was", "by", "or", "he", "his", "i", "from", "which", "but", "they", "at", "have"),
    )
)
ENDINGS = (".", "!", "?", '."', '!"', '?"', ".)", ":", ".'", "!'", "?'")
SYMBOLS = re.compile(r"[<>{}\[\]=_\\/|#$%^*`~@&+]")
LONGEST_WORD = 20


def normalise(text: str) -> str:
    """The text on one line, with ASCII quotes and dashes."""
    text = " ".join(text.translate(TYPOGRAPHY).split())
    return re.sub(r"\s+([,.;:!?)])(?=\s|$)", r"\1", text)


def is_prose(paragraph: str, least_words: int) -> bool:
    """Whether the paragraph is English sentences, at least that many words of them, and not code or a menu."""
    words = paragraph.split()
    if len(words) < least_words or not paragraph.endswith(ENDINGS) or not paragraph.isascii():
        return False
    if len(SYMBOLS.findall(paragraph)) > len(words) / 40 or sum(map(str.isdigit, paragraph)) > len(words) / 6:
        return False
    if max(map(len, words)) > LONGEST_WORD or paragraph[0] not in "\"'(" and not paragraph[0].isupper():
        return False
    common = sum(word.lower().strip("\"'(),.;:!?") in COMMON for word in words)
    return common >= 0.2 * len(words) if len(words) >= 12 else common >= 1


def clean(paragraphs: list[str], least_words: int) -> list[str]:
    """The paragraphs that are prose, normalised, in their order."""
    normalised = (normalise(paragraph) for paragraph in paragraphs)
    return [paragraph for paragraph in normalised if is_prose(paragraph, least_words)]
