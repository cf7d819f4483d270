"""Pipelines of transformers give what they gave, on a model taken over in place and on an engine as their model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from transformers.pipelines import PIPELINE_REGISTRY

import hasten
from tests.inject.vocabulary import bert, bytes_and_merges, words
from tests.tiny.decoders import GPT, WIDE, bloom
from tests.tiny.encoders import BASE, DISTIL, TEXT
from tests.tiny.images import BASE as IMAGE
from tests.tiny.images import DINO
from tests.tiny.model import Tiny, build
from tests.tiny.seq2seq import BART, T5

pytestmark = [  # of transformers 4's question-answering
    pytest.mark.filterwarnings("ignore:Passing a list of SQuAD examples:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

NEW = int(T.__version__.split(".")[0]) >= 5
RGB = {"num_channels": 3, "num_labels": 4}
LABELS = ("contradiction", "entailment", "neutral")
ENTAILMENT = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
SENTENCES = ["the old man looked at the sea", "happy", "that program was no good news for us to see"]
GREEDY = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9}
BEAMS = {"do_sample": False, "max_new_tokens": 7, "num_beams": 3}
SAMPLED = {"do_sample": True, "top_k": 12, "temperature": 0.8, "max_new_tokens": 9}


@dataclass(frozen=True)
class Case:
    """`make` gives the model, `parts` the tokenizer or processor, `inputs` a list of what the pipeline takes."""

    task: str
    make: Callable[[], T.PreTrainedModel]
    parts: Callable[[], dict[str, Any]]
    inputs: Callable[[], list[Any]] = lambda: list(SENTENCES)
    call: dict[str, Any] = field(default_factory=dict)
    served: int = 1  # how many backbones take part


def left() -> dict[str, Any]:
    return {"tokenizer": words(side="left")}


def encoder() -> dict[str, Any]:
    return {"tokenizer": bert()}


def untyped() -> dict[str, Any]:
    return {"tokenizer": bert(typed=False)}


def padded_with_one() -> dict[str, Any]:
    return {"tokenizer": bert(("bos", "pad", "eos", "unk", "mask"))}


def ending() -> dict[str, Any]:
    return {"tokenizer": words(frame="$A [SEP]", pair="$A [SEP] $B [SEP]")}


def ending_padded_with_one() -> dict[str, Any]:
    order = ("bos", "pad", "eos", "unk", "mask")
    return {"tokenizer": words(order=order, frame="$A [SEP]", pair="$A [SEP] $B [SEP]")}


def masked() -> list[str]:
    return ["the old [MASK] looked at the sea", "[MASK] is a program"]


def questions() -> list[dict[str, str]]:
    return [
        {"question": "who looked at the sea", "context": "it was dark and the old man looked at the sea"},
        {"question": "what is deepspeed", "context": "deepspeed is a program"},
    ]


def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 15, 20, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def processor(size: int = 12) -> Callable[[], dict[str, Any]]:
    cls = getattr(T, "ViTImageProcessorPil", T.ViTImageProcessor)
    return lambda: {"image_processor": cls(size={"height": size, "width": size})}


def clip_parts() -> dict[str, Any]:
    return {**processor()(), "tokenizer": words(order=("pad", "bos", "eos", "mask", "unk"), frame="[CLS] $A [SEP]")}


def clip() -> T.PreTrainedModel:
    text = {**TEXT, "eos_token_id": 2}
    return T.CLIPModel(T.CLIPConfig(text_config=text, vision_config={**IMAGE, "num_channels": 3}, projection_dim=20))


def whisper() -> T.PreTrainedModel:
    more = {"num_mel_bins": 8, "max_source_positions": 50, "vocab_size": 300, "begin_suppress_tokens": None}
    return T.WhisperForConditionalGeneration(T.WhisperConfig(**BART | more))


def whisper_parts() -> dict[str, Any]:
    plain = bytes_and_merges().backend_tokenizer
    model = json.loads(plain.to_str())["model"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    marks = {"unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]"}
    given = {"vocab": model["vocab"], "merges": merges} if NEW else {"tokenizer_object": plain}
    cls = T.WhisperTokenizer if NEW else T.WhisperTokenizerFast
    return {"tokenizer": cls(**given, **marks), "feature_extractor": T.WhisperFeatureExtractor(8, chunk_length=1)}


def sounds() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"raw": random.normal(size=n).astype(np.float32), "sampling_rate": 16000} for n in (16000, 7000, 400)]


def gpt2(cls: Any = T.GPT2LMHeadModel, **more: Any) -> Callable[[], T.PreTrainedModel]:
    return lambda: cls(T.GPT2Config(**GPT, pad_token_id=0, **more))


def bert_for(head: str, **more: Any) -> Callable[[], T.PreTrainedModel]:
    return lambda: getattr(T, f"BertFor{head}")(T.BertConfig(**BASE, **more))


def llama(cls: Any = T.LlamaForCausalLM) -> Callable[[], T.PreTrainedModel]:
    return lambda: cls(T.LlamaConfig(**WIDE, num_key_value_heads=2, intermediate_size=40, pad_token_id=0))


CASES = {
    "text-generation, greedy": Case("text-generation", gpt2(), left, call=GREEDY),
    "text-generation, beams": Case("text-generation", llama(), left, call=BEAMS),
    "text-generation, sampled": Case("text-generation", llama(), left, call=SAMPLED | {"num_return_sequences": 2}),
    "text-generation, new text alone": Case("text-generation", gpt2(), left, call=GREEDY | {"return_full_text": False}),
    "text-generation, tokens": Case("text-generation", bloom, left, call=GREEDY | {"return_tensors": True}),
    "text2text-generation": Case(
        "text2text-generation", lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)), ending, call=GREEDY, served=2
    ),
    "summarization": Case(
        "summarization",
        lambda: T.BartForConditionalGeneration(T.BartConfig(**BART)),
        ending_padded_with_one,
        call=GREEDY | {"max_length": 12},
        served=2,
    ),
    "translation": Case(
        "translation",
        lambda: T.MarianMTModel(T.MarianConfig(**BART, scale_embedding=True)),
        ending_padded_with_one,
        call=BEAMS | {"max_length": 12},
        served=2,
    ),
    "fill-mask": Case("fill-mask", bert_for("MaskedLM"), encoder, masked, {"top_k": 7}),
    "fill-mask, positions by the ids": Case(
        "fill-mask", lambda: T.RobertaForMaskedLM(T.RobertaConfig(**BASE, pad_token_id=1)), padded_with_one, masked
    ),
    "fill-mask, no token types": Case(
        "fill-mask", lambda: T.DistilBertForMaskedLM(T.DistilBertConfig(**DISTIL)), untyped, masked
    ),
    "text-classification": Case(
        "text-classification", bert_for("SequenceClassification", num_labels=3), encoder, call={"top_k": None}
    ),
    "text-classification by a decoder": Case("text-classification", gpt2(T.GPT2ForSequenceClassification), left),
    "token-classification": Case("token-classification", bert_for("TokenClassification", num_labels=5), encoder),
    "token-classification, in groups": Case(
        "token-classification",
        bert_for("TokenClassification", num_labels=3),
        encoder,
        call={"aggregation_strategy": "simple"},
    ),
    "question-answering": Case("question-answering", bert_for("QuestionAnswering"), encoder, questions, {"top_k": 2}),
    "feature-extraction": Case("feature-extraction", lambda: T.BertModel(T.BertConfig(**BASE)), encoder),
    "feature-extraction by a decoder": Case("feature-extraction", llama(T.LlamaModel), left),
    "zero-shot-classification": Case(
        "zero-shot-classification",
        bert_for("SequenceClassification", **ENTAILMENT),
        encoder,
        call={"candidate_labels": ["news", "sport", "the sea"], "multi_label": True},
    ),
    "zero-shot-classification, encoder-decoder": Case(
        "zero-shot-classification",
        lambda: T.BartForSequenceClassification(T.BartConfig(**BART, **ENTAILMENT)),
        ending_padded_with_one,
        call={"candidate_labels": ["news", "sport", "the sea"]},
        served=2,
    ),
    "image-classification": Case(
        "image-classification", lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGE | RGB)), processor(), pictures
    ),
    "image-classification, scaled layers": Case(
        "image-classification",
        lambda: T.Dinov2ForImageClassification(T.Dinov2Config(**DINO | RGB)),
        processor(16),
        pictures,
    ),
    "image-feature-extraction": Case(
        "image-feature-extraction", lambda: T.ViTModel(T.ViTConfig(**IMAGE | RGB)), processor(), pictures
    ),
    "zero-shot-image-classification": Case(
        "zero-shot-image-classification",
        clip,
        clip_parts,
        pictures,
        {"candidate_labels": ["house", "the sea"], "hypothesis_template": "this is {}"},
        served=2,
    ),
    "automatic-speech-recognition": Case(
        "automatic-speech-recognition", whisper, whisper_parts, sounds, {"generate_kwargs": GREEDY}, served=2
    ),
}
HERE = {n: c for n, c in CASES.items() if c.task in PIPELINE_REGISTRY.get_supported_tasks()}


def pipe_of(c: Case) -> Any:
    return T.pipeline(c.task, model=build(Tiny(c.make, "decoder")), device="cpu", **c.parts())


def answers(pipe: Any, c: Case) -> list[Any]:
    """What the pipeline says one by one, and in batches that need padding."""
    torch.manual_seed(0)
    alone = [pipe(x, **c.call) for x in c.inputs()]
    return [alone, list(pipe(c.inputs(), batch_size=2, **c.call))]


def equal(got: Any, want: Any) -> None:
    """Texts, labels and ids are equal, numbers to 1e-5, in the same containers."""
    match want:
        case dict():
            assert got.keys() == want.keys()
            for k in want:
                equal(got[k], want[k])
        case list() | tuple():
            assert len(got) == len(want)
            for g, w in zip(got, want, strict=True):
                equal(g, w)
        case float() | np.floating():
            assert got == pytest.approx(want, rel=1e-5, abs=1e-5)
        case torch.Tensor() | np.ndarray():
            torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), atol=1e-5, rtol=1e-5)
        case _:
            assert got == want


@contextmanager
def served(engine: Any, count: int) -> Iterator[None]:
    """Inside, `count` backbones answer every call, and none leaves one to the model's own forward."""
    assert len(engine.backbones) == count
    yield
    natively = engine.generating is not None and engine.generating.served > 0
    assert natively or all(b.calls > 0 for b in engine.backbones), "a fused backbone was never called"
    assert not any(b.detours for b in engine.backbones), [dict(b.detours) for b in engine.backbones]


@pytest.mark.parametrize("name", HERE)
def test_a_pipeline_gives_the_same_before_during_and_after(name: str) -> None:
    c = HERE[name]
    pipe = pipe_of(c)
    want = answers(pipe, c)
    engine = hasten.init_inference(pipe.model)
    with served(engine, c.served):
        equal(answers(pipe, c), want)
    assert engine.revert() is pipe.model
    equal(answers(pipe, c), want)


@pytest.mark.parametrize("name", HERE)
def test_an_engine_is_a_pipelines_model(name: str) -> None:
    c = HERE[name]
    pipe = pipe_of(c)
    want = answers(pipe, c)
    pipe.model = hasten.init_inference(pipe.model, dtype=torch.float, replace_with_kernel_inject=True)
    with served(pipe.model, c.served):
        equal(answers(pipe, c), want)
    pipe.model = pipe.model.revert()
    equal(answers(pipe, c), want)


def test_a_pipeline_is_made_of_an_engine() -> None:
    c = CASES["text-generation, greedy"]
    want = answers(pipe_of(c), c)
    model = hasten.init_inference(build(Tiny(c.make, "decoder")))
    with served(model, c.served):
        equal(answers(T.pipeline(c.task, model=model, device="cpu", **c.parts()), c), want)


def test_every_task_that_is_promised_is_here() -> None:
    promised = {"text-generation", "fill-mask", "text-classification", "token-classification", "feature-extraction"}
    promised |= {"zero-shot-classification", "image-classification", "automatic-speech-recognition"}
    assert promised <= {c.task for c in HERE.values()}
    later = {"text2text-generation", "summarization", "translation", "question-answering"}
    assert NEW or later <= {c.task for c in HERE.values()}
