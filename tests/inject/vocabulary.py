"""Tiny tokenizers of the common kinds, made here: words for models with 67 tokens, bytes for those with 300."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SIZE, BYTES = 67, 300
TEXT = (
    "the old man looked at sea and said deepspeed is a program that should first be in beginning of this example one "
    "two three may you do not see what we have here for us to go on with when it was dark no who could tell them how "
    "much water there had been happy sad news sport house"
)
MARKS = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]", "unk": "[UNK]"}


def words(
    *,
    order: Sequence[str] = ("pad", "bos", "eos", "mask", "unk"),
    frame: str = "$A",
    pair: str = "$A $B:1",
    side: str = "right",
) -> PreTrainedTokenizerFast:
    """A word a token. `order`: the marks with the lowest ids; `frame` and `pair`: where they stand around texts."""
    vocabulary = [MARKS[m] for m in order] + list(dict.fromkeys(TEXT.split()))
    assert len(vocabulary) <= SIZE
    vocabulary += [f"word{i}" for i in range(SIZE - len(vocabulary))]
    ids = {w: i for i, w in enumerate(vocabulary)}
    t = Tokenizer(models.WordLevel(ids, unk_token=MARKS["unk"]))
    t.normalizer = normalizers.Lowercase()
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.post_processor = processors.TemplateProcessing(
        single=frame, pair=pair, special_tokens=[(m, ids[m]) for m in ("[CLS]", "[SEP]")]
    )
    return _finish(t, side)


def bert(order: Sequence[str] = ("pad", "bos", "eos", "mask", "unk"), *, typed: bool = True) -> PreTrainedTokenizerFast:
    """Texts between marks, as encoders read them; `typed`: with token_type_ids."""
    t = words(order=order, frame="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1")
    if typed:
        t.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return t


def bytes_and_merges(side: str = "left") -> PreTrainedTokenizerFast:
    """Byte-level pairs, as GPT-2 has them: every text has tokens, some characters are halves of them."""
    t = Tokenizer(models.BPE(unk_token=None))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTES, special_tokens=list(MARKS.values()), initial_alphabet=letters, show_progress=False
    )
    t.train_from_iterator([TEXT], trainer)
    return _finish(t, side)


def _finish(t: Tokenizer, side: str) -> PreTrainedTokenizerFast:
    names = {f"{m}_token": v for m, v in MARKS.items()}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=t, padding_side=side, model_max_length=60, model_input_names=inputs, **names
    )
