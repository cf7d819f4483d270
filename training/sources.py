"""The texts: packages of Debian, their licences, how they are read, and how often one pass over the data shows each."""

from __future__ import annotations

from dataclasses import dataclass

from training import readers
from training.readers import Reader

DOC = "usr/share/doc"


@dataclass(frozen=True, slots=True)
class Source:
    """A text that packages carry. Files that match a pattern are read; shorter paragraphs are dropped."""

    name: str
    packages: tuple[str, ...]
    licence: str
    reader: Reader
    patterns: tuple[str, ...]
    weight: float
    least_words: int = 8


def _wesnoth() -> tuple[str, ...]:
    campaigns = (
        "did",
        "dm",
        "dw",
        "ei",
        "httt",
        "l",
        "low",
        "nr",
        "sof",
        "sota",
        "sotbe",
        "thot",
        "trow",
        "tsg",
        "ttb",
    )
    return tuple(f"wesnoth-1.16-{part}" for part in ("data", *campaigns, "utbs"))


SOURCES = (
    Source(
        name="wesnoth",
        packages=_wesnoth(),
        licence="GPL-2.0-or-later",
        reader=readers.wesnoth,
        patterns=("usr/share/games/wesnoth/1.16/data/**/*.cfg",),
        weight=3,
        least_words=4,
    ),
    Source(
        name="endless-sky",
        packages=("endless-sky-data",),
        licence="GPL-3.0-or-later",
        reader=readers.endless_sky,
        patterns=("usr/share/games/endless-sky/data/**/*.txt",),
        weight=3,
        least_words=4,
    ),
    Source(
        name="naev",
        packages=("naev-data",),
        licence="GPL-3.0-or-later",
        reader=readers.lua,
        patterns=("usr/share/naev/dat/missions/**/*.lua", "usr/share/naev/dat/events/**/*.lua"),
        weight=3,
        least_words=6,
    ),
    Source(
        name="crawl",
        packages=("crawl-common",),
        licence="GPL-2.0-or-later",
        reader=readers.crawl,
        patterns=("usr/share/crawl/dat/descript/*.txt",),
        weight=2,
        least_words=6,
    ),
    Source(
        name="king-james-bible",
        packages=("bible-kjv", "bible-kjv-text"),
        licence="public domain",
        reader=readers.king_james,
        patterns=("usr/bin/bible",),
        weight=1,
    ),
    Source(
        name="jargon-file",
        packages=("dict-jargon",),
        licence="public domain",
        reader=readers.dictionary,
        patterns=("usr/share/dictd/jargon.dict.dz",),
        weight=2,
    ),
    Source(
        name="debian-handbook",
        packages=("debian-handbook",),
        licence="GPL-2.0-or-later OR CC-BY-SA-3.0",
        reader=readers.html,
        patterns=(f"{DOC}/debian-handbook/html/en-US/*.html",),
        weight=1,
    ),
    Source(
        name="debian-documents",
        packages=("debian-faq", "debian-history", "debian-reference-en", "developers-reference"),
        licence="GPL-2.0-or-later",
        reader=readers.html,
        patterns=(
            f"{DOC}/debian/FAQ/*.en.html",
            f"{DOC}/debian-history/**/*.en.html",
            "usr/share/debian-reference/*.en.html",
            f"{DOC}/developers-reference/*.html",
        ),
        weight=1,
    ),
    Source(
        name="gnome-help",
        packages=("gnome-user-docs",),
        licence="CC-BY-SA-3.0",
        reader=readers.mallard,
        patterns=("usr/share/help/C/**/*.page",),
        weight=1,
    ),
    Source(
        name="rust-book",
        packages=("rust-doc",),
        licence="MIT OR Apache-2.0",
        reader=readers.html,
        patterns=(f"{DOC}/rust*/html/book/ch*.html",),
        weight=1,
    ),
    Source(
        name="python-manual",
        packages=("python3.11-doc",),
        licence="PSF-2.0",
        reader=readers.html,
        patterns=tuple(f"{DOC}/python3.11/html/{part}/*.html" for part in ("tutorial", "howto", "faq")),
        weight=1,
    ),
    Source(
        name="postgresql-manual",
        packages=("postgresql-doc-15",),
        licence="PostgreSQL",
        reader=readers.html,
        patterns=(f"{DOC}/postgresql-doc-15/html/*.html",),
        weight=0.2,
    ),
    Source(
        name="git-manual",
        packages=("git-doc",),
        licence="GPL-2.0-only",
        reader=readers.html,
        patterns=(f"{DOC}/git-doc/*.html",),
        weight=0.2,
    ),
    Source(
        name="anarchism-faq",
        packages=("anarchism",),
        licence="GPL-2.0-only",
        reader=readers.html,
        patterns=(f"{DOC}/anarchism/html/*.html",),
        weight=0.35,
    ),
    Source(
        name="jane-austen",
        packages=("r-cran-janeaustenr",),
        licence="public domain",
        reader=readers.r_data,
        patterns=("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",),
        weight=2,
        least_words=2,
    ),
    Source(
        name="moby-dick",
        packages=("r-cran-tokenizers",),
        licence="public domain",
        reader=readers.r_data,
        patterns=("usr/lib/R/site-library/tokenizers/data/Rdata.rdb",),
        weight=2,
        least_words=2,
    ),
    Source(
        name="tom-sawyer",
        packages=("golang-github-klauspost-compress-dev",),
        licence="public domain",
        reader=readers.novel,
        patterns=("usr/share/gocode/src/github.com/klauspost/compress/testdata/Mark.Twain-Tom.Sawyer.txt",),
        weight=2,
        least_words=2,
    ),
    Source(
        name="world-english-bible",
        packages=("sword-text-web",),
        licence="public domain",
        reader=readers.sword,
        patterns=("usr/share/sword/modules/texts/ztext/*/*.bzs",),
        weight=0.7,
        least_words=4,
    ),
    Source(
        name="freedroid",
        packages=("freedroidrpg-data",),
        licence="GPL-2.0-or-later",
        reader=readers.lua,
        patterns=("usr/share/freedroidrpg/data/storyline/**/*.lua",),
        weight=2,
        least_words=4,
    ),
    Source(
        name="widelands",
        packages=("widelands-data",),
        licence="GPL-2.0-or-later",
        reader=readers.lua,
        patterns=("usr/share/games/widelands/data/campaigns/**/*.lua",),
        weight=2,
        least_words=4,
    ),
)
