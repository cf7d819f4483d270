"""Packing: documents become tokens, then rows of one length in an order that a seed and the pass decide."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def main() -> None:
    """Write train.npz and validation.npz, all that training reads, beside the text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/build"))
    work = parser.parse_args().work
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    for split in ("train", "validation"):
        Corpus.read(work / f"{split}.jsonl", tokenizer).save(work / f"{split}.npz")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokenised documents, each behind an end-of-text token, and how often one pass over the data shows each."""

    documents: list[np.ndarray]
    weights: list[float]

    @classmethod
    def read(cls, path: Path, tokenizer: PreTrainedTokenizerBase) -> Corpus:
        """The documents of a split."""
        records = [json.loads(line) for line in path.read_text().splitlines()]
        tokenised = tokenizer([record["text"] for record in records], verbose=False)["input_ids"]
        documents = [np.array([tokenizer.eos_token_id, *tokens], dtype=np.uint16) for tokens in tokenised]
        return cls(documents, [record["weight"] for record in records])

    def save(self, path: Path) -> None:
        """Write the documents end to end, their lengths and their weights."""
        lengths = [len(document) for document in self.documents]
        np.savez_compressed(path, tokens=np.concatenate(self.documents), lengths=lengths, weights=self.weights)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """What was saved."""
        with np.load(path) as saved:
            documents = np.split(saved["tokens"], np.cumsum(saved["lengths"])[:-1])
            return cls(documents, saved["weights"].tolist())

    def rows(self, length: int) -> Tensor:
        """Every document once, in order: (rows, length)."""
        return _rows(self.documents, length)

    def shuffled(self, length: int, seed: int, number: int) -> Tensor:
        """Pass `number` over the data: documents drawn by weight, then packed, in random order: (rows, length)."""
        order = random.Random(f"{seed}/{number}")
        drawn = []
        for document, weight in zip(self.documents, self.weights, strict=True):
            drawn += [document] * int(weight + order.random())
        order.shuffle(drawn)
        rows = _rows(drawn, length)
        return rows[torch.tensor(order.sample(range(len(rows)), len(rows)))]

    def batches(
        self, length: int, size: int, *, seed: int, skip: int, device: str | torch.device = "cpu"
    ) -> Iterator[Tensor]:
        """Endless batches (size, length) on the device, without the first `skip`."""
        number = 0
        while True:
            batches = self.shuffled(length, seed, number).to(device).split(size)
            batches = batches[: len(batches) - (len(batches[-1]) < size)]
            yield from batches[skip:]
            skip = max(0, skip - len(batches))
            number += 1


def _rows(documents: list[np.ndarray], length: int) -> Tensor:
    tokens = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    return tokens[: len(tokens) // length * length].view(-1, length)


if __name__ == "__main__":
    main()
