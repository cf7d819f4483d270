"""The tokenizer: byte-level byte-pair encoding, trained on the training split and saved in Hugging Face's format."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096


def main() -> None:
    """Train on train.jsonl and save into a folder beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/build"))
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    arguments = parser.parse_args()
    tokenizer = train(texts(arguments.work / "train.jsonl"), arguments.vocabulary)
    save(tokenizer, arguments.work / "tokenizer")


def texts(path: Path) -> Iterator[str]:
    """The documents of a split."""
    with open(path) as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train(corpus: Iterator[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of that many tokens; any string encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, context: int = 512) -> None:
    """Write tokenizer.json and tokenizer_config.json; documents begin and end with the one special token."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
