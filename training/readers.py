"""One reader per file format: a file becomes documents, each a name and its raw paragraphs."""

from __future__ import annotations

import gzip
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

Document = tuple[str, list[str]]
Reader = Callable[[Path], Iterator[Document]]

BLOCKS = frozenset({"p", "li", "dd", "blockquote", "div", "td"})
HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6", "dt"})
SKIPPED = HEADINGS | {"pre", "table", "nav", "script", "style", "head", "sup", "footer"}
MALLARD = "{http://projectmallard.org/1.0/}"
SPEAKERLESS = frozenset({"narrator", "unit", "second_unit", "$unit.id"})
SPEECH = re.compile(
    r'speaker\s*=\s*"?([^"\n]*)|\b(?:message|story|description)\s*=\s*_\s*"((?:[^"]|"")*)"|\[/message\]'
)
PLAYER = {"<first>": "Morgan", "<last>": "Hale", "<ship>": "Kestrel"}
VERSES_PER_PARAGRAPH = 4
BOOKS = (
    *("Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth", "1Samuel"),
    *("2Samuel", "1Kings", "2Kings", "1Chronicles", "2Chronicles", "Ezra", "Nehemiah", "Esther", "Job", "Psalms"),
    *("Proverbs", "Ecclesiastes", "Song", "Isaiah", "Jeremiah", "Lamentations", "Ezekiel", "Daniel", "Hosea"),
    *("Joel", "Amos", "Obadiah", "Jonah", "Micah", "Nahum", "Habakkuk", "Zephaniah", "Haggai", "Zechariah"),
    *("Malachi", "Matthew", "Mark", "Luke", "John", "Acts", "Romans", "1Corinthians", "2Corinthians", "Galatians"),
    *("Ephesians", "Philippians", "Colossians", "1Thessalonians", "2Thessalonians", "1Timothy", "2Timothy"),
    *("Titus", "Philemon", "Hebrews", "James", "1Peter", "2Peter", "1John", "2John", "3John", "Jude", "Revelation"),
)


class _Paragraphs(HTMLParser):
    """Collects the text of block elements, leaving out code, tables and headings."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self.text: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self.flush()
        self.skipping += tag in SKIPPED

    def handle_endtag(self, tag: str) -> None:
        self.skipping -= tag in SKIPPED and self.skipping > 0
        if tag in BLOCKS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.text.append(data)

    def flush(self) -> None:
        self.paragraphs.append("".join(self.text))
        self.text.clear()


def html(path: Path) -> Iterator[Document]:
    """A page is a document; its paragraphs, list items and definitions are paragraphs."""
    parser = _Paragraphs()
    parser.feed(path.read_text(encoding="utf-8", errors="replace").replace("\u00b6", ""))
    parser.flush()
    yield path.stem, parser.paragraphs


def mallard(path: Path) -> Iterator[Document]:
    """A help page of GNOME is a document."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError:  # entities that a DTD elsewhere defines
        return
    yield path.stem, ["".join(p.itertext()) for p in root.iter(f"{MALLARD}p")]


def wesnoth(path: Path) -> Iterator[Document]:
    """A scenario is a document; a line of dialogue is "Speaker: words", a part of the story is itself."""
    text = path.read_text(encoding="utf-8", errors="replace")
    speaker, paragraphs = "", []
    for match in SPEECH.finditer(text):
        if match[2] is None:
            speaker = (match[1] or "").strip()
            continue
        words = re.sub(r"<[^>]*>", "", match[2].split("^", 1)[-1]).replace('""', '"')
        named = speaker and speaker not in SPEAKERLESS and re.fullmatch(r"[A-Z][A-Za-z' -]*", speaker)
        paragraphs.append(f"{speaker}: {words}" if named else words)
    yield f"{path.parent.parent.name}/{path.stem}", paragraphs


def endless_sky(path: Path) -> Iterator[Document]:
    """A mission, planet, ship or event is a document; its conversation and descriptions are paragraphs."""
    for i, block in enumerate(re.split(r"\n(?=\S)", path.read_text(encoding="utf-8", errors="replace"))):
        paragraphs = []
        for tick, quote in re.findall(r'`([^`\n]*)`|(?:description|spaceport|dialog) "([^"\n]*)"', block):
            text = tick or quote
            for name, value in PLAYER.items():
                text = text.replace(name, value)
            paragraphs.append(text)
        yield f"{path.stem}/{i}", paragraphs


def lua(path: Path) -> Iterator[Document]:
    """A script is a document; its translatable strings, _("..."), _"..." and _([[...]]), are paragraphs."""
    text = path.read_text(encoding="utf-8", errors="replace")
    strings = re.findall(r'_\(?\s*(?:\[\[(.*?)\]\]|"((?:\\.|[^"\\])*)")', text, re.DOTALL)
    paragraphs = [long or short.replace('\\"', '"').replace("\\n", "\n") for long, short in strings]
    yield f"{path.parent.name}/{path.stem}", [line for paragraph in paragraphs for line in paragraph.split("\n")]


def crawl(path: Path) -> Iterator[Document]:
    """An entry is a document: a key line, then paragraphs between blank lines."""
    for i, entry in enumerate(path.read_text(encoding="utf-8", errors="replace").split("%%%%")):
        _, _, body = entry.strip().partition("\n")
        yield f"{path.stem}/{i}", re.split(r"\n\s*\n", body)


def dictionary(path: Path) -> Iterator[Document]:
    """An entry of a dictd file is a document: a head word at the margin, then an indented body."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    for i, entry in enumerate(re.split(r"\n(?=\S)", text)):
        body = re.sub(r"^[ \t]*(?:\d+\.)?[ \t]*(?:\[[^\]]*\])?[ \t]*", "", entry.partition("\n")[2], flags=re.MULTILINE)
        yield f"{path.stem}/{i}", re.split(r"\n\s*\n", re.sub(r"[{}]", "", body))


def king_james(path: Path) -> Iterator[Document]:
    """A chapter is a document; `path` is the packaged retrieval program, its text beside it in ../lib."""
    for book in BOOKS:
        query = f"{book}1:1-{book}150:200\n"
        command = [path, "-p", path.parent.parent / "lib", "-l", "100000"]
        answer = subprocess.run(command, input=query, capture_output=True, text=True, check=True).stdout
        for chapter in re.split(r"\n\s*\n(?=\d?[A-Z][\w ]+ \d+\n)", answer):
            verses = re.findall(r"^\s*\d+ ((?:.|\n(?!\s*\d+ |\s*\n))+)", chapter, re.MULTILINE)
            starts = range(0, len(verses), VERSES_PER_PARAGRAPH)
            paragraphs = [" ".join(verses[i : i + VERSES_PER_PARAGRAPH]) for i in starts]
            yield f"{book}/{chapter.strip().splitlines()[0] if chapter.strip() else ''}", paragraphs


def novel(path: Path) -> Iterator[Document]:
    """A novel of Project Gutenberg is a document; its notices are no part of it."""
    text = path.read_text(encoding="utf-8", errors="replace")
    yield path.stem, _novel(text)


def r_data(path: Path) -> Iterator[Document]:
    """A character vector of R, in a database of lazy data, is a document: the lines of a novel."""
    packed, number = path.read_bytes(), 0
    while packed:  # the length of what follows when unpacked, then that, again and again
        unpacking = zlib.decompressobj()
        vector = unpacking.decompress(packed[4:])
        packed = unpacking.unused_data
        yield f"{path.parent.parent.name}/{number}", _novel("\n".join(_strings(vector)))
        number += 1


def _novel(text: str) -> list[str]:
    text = re.sub(r".*\*\*\* ?START OF[^\n]*", "", text.replace("\r", ""), flags=re.DOTALL)
    body, _, _ = text.partition("*** END OF")
    return [re.sub(r"\s*--\s*", " - ", p.replace("_", "")) for p in re.split(r"\n\s*\n", body)]


def _strings(vector: bytes) -> Iterator[str]:
    """The elements of a character vector in R's XDR serialization, version 3."""
    (encoding,) = struct.unpack_from(">i", vector, 14)
    at = 18 + encoding
    kind, count = struct.unpack_from(">ii", vector, at)
    if kind & 0xFF != 16:
        return
    at += 8
    for _ in range(count):
        (size,) = struct.unpack_from(">i", vector, at + 4)
        at += 8
        yield vector[at : at + max(size, 0)].decode("utf-8", errors="replace")
        at += max(size, 0)


def sword(path: Path) -> Iterator[Document]:
    """A book of a Sword module is a document, `path` the index of its compressed blocks; notes are left out."""
    blocks = path.with_suffix(".bzz").read_bytes()
    for number, (start, size, _) in enumerate(struct.iter_unpack("<III", path.read_bytes())):
        text = zlib.decompress(blocks[start : start + size]).decode("utf-8", errors="replace")
        text = re.sub(r"<(note|title)\b.*?</\1>", " ", text, flags=re.DOTALL)
        parts = re.split(r'<div sID="[^"]*" type="x-p"/>|<chapter[^>]*>', text)
        yield f"{path.stem}/{number}", [re.sub(r"<[^>]*>", "", re.sub(r"<l[ g][^>]*>", " ", p)) for p in parts]
