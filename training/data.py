"""Text for the model: packages are fetched and unpacked, their prose is cleaned, deduplicated and split by document."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from training.prose import clean
from training.sources import SOURCES, Source

SPLITS = {
    "heldout": 0.02,
    "validation": 0.03,
    "train": 1.0,
}  # a document is in the first whose number its draw is below
WORDS_PER_DOCUMENT = 1500  # longer ones are cut at a paragraph, so that held-out text comes from many places


@dataclass(frozen=True, slots=True)
class Text:
    """A cleaned document; its key decides, by hash, its split."""

    key: str
    text: str

    @property
    def draw(self) -> float:
        """A number in [0, 1) that is the same in every run."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big") / 2**64

    @property
    def split(self) -> str:
        """Held out for the figures in the card, to watch the training by, or to train on."""
        return next(split for split, below in SPLITS.items() if self.draw < below)


def main() -> None:
    """Write train.jsonl, validation.jsonl, heldout.jsonl and manifest.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/build"))
    work = parser.parse_args().work
    build(SOURCES, work)


def build(sources: tuple[Source, ...], work: Path) -> None:
    """Fetch every source and write the splits, in whole documents, and the manifest beside them."""
    seen: set[bytes] = set()
    manifest = []
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(work / f"{split}.jsonl", "w")) for split in SPLITS}
        for source in tqdm(sources, desc="sources", unit="source"):
            archives = [fetch(package, work / "packages") for package in source.packages]
            texts = [new for text in documents(source, unpack(source, archives, work)) if (new := unseen(text, seen))]
            words = dict.fromkeys(SPLITS, 0)
            for text in texts:
                words[text.split] += len(text.text.split())
                record = {"source": source.name, "weight": source.weight, "text": text.text}
                files[text.split].write(json.dumps(record) + "\n")
            manifest.append(describe(source, archives) | {"documents": len(texts), "words": words})
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def fetch(package: str, folder: Path) -> Path:
    """The package's archive, downloaded with apt-get if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob(f"{package}_*.deb"))):
        subprocess.run(["apt-get", "-q", "download", package], cwd=folder, check=True, capture_output=True)
        found = sorted(folder.glob(f"{package}_*.deb"))
    return found[-1]


def unpack(source: Source, archives: list[Path], work: Path) -> Path:
    """The folder that holds the files of the source's packages."""
    folder = work / "unpacked" / source.name
    for archive in archives:
        if not (done := folder / f".{archive.stem}").exists():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
            done.touch()
    return folder


def documents(source: Source, folder: Path) -> Iterator[Text]:
    """The source's documents, cleaned, none longer than about WORDS_PER_DOCUMENT words."""
    paths = sorted({path for pattern in source.patterns for path in folder.glob(pattern) if path.is_file()})
    for path in paths:
        for name, paragraphs in source.reader(path):
            for i, text in enumerate(cut(clean(paragraphs, source.least_words))):
                yield Text(f"{source.name}/{path.relative_to(folder)}/{name}/{i}", text)


def cut(paragraphs: list[str]) -> Iterator[str]:
    """The paragraphs joined by blank lines, in pieces."""
    piece: list[str] = []
    words = 0
    for paragraph in paragraphs:
        piece.append(paragraph)
        words += len(paragraph.split())
        if words >= WORDS_PER_DOCUMENT:
            yield "\n\n".join(piece)
            piece, words = [], 0
    if piece:
        yield "\n\n".join(piece)


def unseen(text: Text, seen: set[bytes]) -> Text | None:
    """The text without the paragraphs seen before, or None where too little is left to read."""
    kept = []
    for paragraph in text.text.split("\n\n"):
        mark = hashlib.sha256(paragraph.lower().encode()).digest()[:12]
        if mark not in seen:
            seen.add(mark)
            kept.append(paragraph)
    whole = "\n\n".join(kept)
    return Text(text.key, whole) if len(whole.split()) >= 15 else None


def describe(source: Source, archives: list[Path]) -> dict[str, object]:
    """What the manifest says of a source: its licence and the very archives it came from."""
    packages = [
        {"file": archive.name.replace("%3a", ":"), "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
        for archive in archives
    ]
    return {"source": source.name, "licence": source.licence, "weight": source.weight, "packages": packages}


if __name__ == "__main__":
    main()
