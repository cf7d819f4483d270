"""Prose is kept, everything else is dropped; every reader finds the words and leaves the markup."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import readers, tokenizer
from training.data import Text, cut, unseen
from training.prose import clean, is_prose, normalise

SENTENCE = "The king rode out of the city with all of his men, and he did not look back."


@pytest.mark.parametrize(
    "text",
    [
        "for (i = 0; i < n; i++) { x[i] = y[i]; }",
        "See also the following pages",
        "the first letter of this sentence is not a capital, and so it is a part of something.",
        "Überall in the land of the free and the home of the brave, it was cold.",
        "In 1066, 1215, 1414, 1485, 1588 and 1642 it was as in 1688, 1776 and 1789.",
        "The file is in /usr/share/doc and the other is in /usr/lib, said he to her.",
        "Short it is.",
        "",
    ],
)
def test_what_is_not_prose_is_dropped(text: str) -> None:
    assert not is_prose(text, 8)


def test_prose_is_kept_in_plain_typography() -> None:
    assert clean(["  \u201cWait,\u201d she  said to the\u00a0king \u2013 \u201cit\u2019s late \u2026\u201d\n"], 4) == [
        '"Wait," she said to the king - "it\'s late ..."'
    ]


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def read(reader: readers.Reader, path: Path, content: str) -> list[str]:
    path.write_text(content)
    return [normalise(p) for _, paragraphs in reader(path) for p in paragraphs if p.strip()]


def test_html_leaves_code_tables_and_headings_out(tmp_path: Path) -> None:
    page = f"<head><title>No</title></head><h1>No</h1><p>{SENTENCE}<pre>no</pre><table><td>no</table><li>Yes &amp; yes"
    assert read(readers.html, tmp_path / "a.html", page) == [SENTENCE, "Yes & yes"]


def test_dialogue_names_its_speaker_once_per_message(tmp_path: Path) -> None:
    scenario = (
        '[message]\nspeaker=Konrad\nmessage= _ "We <i>must</i> ""go""!"\n[/message]\n'
        '[message]\nspeaker=narrator\nmessage= _ "hint^They went."\n[/message]\n[part]\nstory=_ "Later."\n[/part]\n'
    )
    assert read(readers.wesnoth, tmp_path / "a.cfg", scenario) == ['Konrad: We must "go"!', "They went.", "Later."]


def test_conversations_come_without_their_choices_markup(tmp_path: Path) -> None:
    mission = (
        'mission "A"\n\ton offer\n\t\t`Captain <last>, wait.`\n\t\t\tgoto end\nplanet B\n\tdescription "It is cold."\n'
    )
    assert read(readers.endless_sky, tmp_path / "a.txt", mission) == ["Captain Hale, wait.", "It is cold."]


def test_scripts_give_their_translated_strings(tmp_path: Path) -> None:
    script = 'x = _([[One.\n    Two.]])\ny = _("He said \\"no\\".")\nz = "not text"\nsays(_"Go.")\n'
    assert read(readers.lua, tmp_path / "a.lua", script) == ["One.", "Two.", 'He said "no".', "Go."]


def test_entries_lose_their_keys(tmp_path: Path) -> None:
    assert read(readers.crawl, tmp_path / "a.txt", "%%%%\nAgnes\n\nShe is\nold.\n%%%%\nB\n\nC.") == [
        "She is old.",
        "C.",
    ]


def test_dictionary_bodies_lose_their_brackets(tmp_path: Path) -> None:
    (path := tmp_path / "a.dict.dz").write_bytes(
        gzip.compress(b"foo\n /foo/, n.\n\n    1. [common] A {bar} of\n    old.\n")
    )
    assert normalise(next(iter(readers.dictionary(path)))[1][-1]) == "A bar of old."


def test_help_pages_give_their_paragraphs(tmp_path: Path) -> None:
    page = '<page xmlns="http://projectmallard.org/1.0/"><title>No</title><p>Press <key>Alt</key> now.</p></page>'
    assert read(readers.mallard, tmp_path / "a.page", page) == ["Press Alt now."]


def test_novels_lose_the_notices_around_them(tmp_path: Path) -> None:
    story = f"The _old_ king--he\r\nwept.\r\n\r\n{SENTENCE}\r\n"
    book = f"Produced by X.\r\n*** START OF THIS BOOK ***\r\n\r\n{story}*** END OF IT\n\nNo."
    assert read(readers.novel, tmp_path / "a.txt", book) == ["The old king - he wept.", SENTENCE]
    assert read(readers.novel, tmp_path / "b.txt", SENTENCE) == [SENTENCE]


def test_vectors_of_r_are_unpacked(tmp_path: Path) -> None:
    lines = ["The king", "wept.", "", SENTENCE]
    packed = b""
    for vector in (lines, [SENTENCE]):
        head = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8" + struct.pack(">ii", 16, len(vector))
        body = b"".join(struct.pack(">ii", 0x40009, len(line)) + line.encode() for line in vector)
        packed += struct.pack(">i", len(head + body)) + zlib.compress(head + body)
    (path := tmp_path / "Rdata.rdb").write_bytes(packed)
    assert [paragraphs for _, paragraphs in readers.r_data(path)] == [["The king\nwept.", SENTENCE], [SENTENCE]]


def test_sword_books_lose_their_notes_and_keep_their_words_apart(tmp_path: Path) -> None:
    book = '<title level="1">No</title><div sID="a" type="x-p"/>The <w lemma="b">king</w><note n="1">no</note> wept.'
    book += '<div eID="a" type="x-p"/><lg sID="c"/><l sID="d"/>He<l eID="d"/><l sID="e"/>sang.<l eID="e"/>'
    book += '<chapter n="2"/>End.'
    packed = zlib.compress(book.encode())
    (tmp_path / "ot.bzz").write_bytes(packed)
    (path := tmp_path / "ot.bzs").write_bytes(struct.pack("<III", 0, len(packed), len(book)))
    assert [normalise(p) for p in next(readers.sword(path))[1]] == ["", "The king wept. He sang.", "End."]


def test_documents_are_spread_over_the_splits() -> None:
    splits = Counter(Text(str(i), "").split for i in range(20000))
    assert abs(splits["heldout"] - 400) < 80 and abs(splits["validation"] - 200) < 60
    assert Text("0", "").split == Text("0", "other").split


def test_a_paragraph_is_kept_the_first_time_only() -> None:
    seen: set[bytes] = set()
    other = SENTENCE.replace("king", "queen")
    assert unseen(Text("a", SENTENCE), seen) == Text("a", SENTENCE)
    assert unseen(Text("b", SENTENCE.upper()), seen) is None
    assert unseen(Text("c", f"{SENTENCE}\n\n{other}"), seen) == Text("c", other)


def test_cut_documents_keep_every_paragraph() -> None:
    paragraphs = [f"{i} " + "word " * 700 for i in range(5)]
    pieces = list(cut(paragraphs))
    assert len(pieces) == 2
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)


@given(st.text())
def test_the_tokenizer_gives_any_text_back(text: str) -> None:
    plain = "".join(character for character in text if character.isascii())
    encoder = tokenizer.train(iter([SENTENCE]), 280)
    assert encoder.decode(encoder.encode(plain).ids, skip_special_tokens=False) == plain
