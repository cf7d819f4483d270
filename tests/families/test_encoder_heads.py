"""Task heads on a fused encoder give what they gave: logits, losses, hidden states, tuples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor
from transformers import PreTrainedModel

import hasten
from hasten.errors import RequestError, UnsupportedModel
from hasten.inject.attach import attach
from hasten.inject.backbone import Backbone
from tests.families.parity import same
from tests.tiny.encoders import BASE, DISTIL
from tests.tiny.images import BASE as IMAGE
from tests.tiny.images import DINO
from tests.tiny.model import Tiny, build

CONFIGS: dict[str, T.PretrainedConfig] = {
    "Bert": T.BertConfig(**BASE),
    "DistilBert": T.DistilBertConfig(**DISTIL),
    "Electra": T.ElectraConfig(**BASE, embedding_size=20),
    "Albert": T.AlbertConfig(**BASE, embedding_size=20),
    "Roberta": T.RobertaConfig(**BASE, pad_token_id=1),
    "MPNet": T.MPNetConfig(**BASE, pad_token_id=1),
    "XLMRobertaXL": T.XLMRobertaXLConfig(**BASE, pad_token_id=1),
}
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
CLASSES = [f"{family}For{head}" for family in CONFIGS for head in HEADS]
CLASSES += ["BertForNextSentencePrediction", "BertForPreTraining", "AlbertForPreTraining", "ElectraForPreTraining"]
VISION = {
    "ViTForImageClassification": T.ViTConfig(**IMAGE, num_labels=5),
    "DeiTForImageClassification": T.DeiTConfig(**IMAGE, num_labels=5),
    "DeiTForImageClassificationWithTeacher": T.DeiTConfig(**IMAGE, num_labels=5),
    "BeitForImageClassification": T.BeitConfig(**IMAGE, num_labels=5, use_relative_position_bias=True),
    "Data2VecVisionForImageClassification": T.Data2VecVisionConfig(**IMAGE, num_labels=5),
    "Dinov2ForImageClassification": T.Dinov2Config(**DINO, num_labels=5),
    "ViTMSNForImageClassification": T.ViTMSNConfig(**IMAGE, num_labels=5),
}


def fused(model: PreTrainedModel) -> tuple[PreTrainedModel, list[Backbone]]:
    """A copy of the model with its backbones replaced."""
    ours = copy.deepcopy(model)
    backbones = attach(ours)
    for b in backbones:
        b.install()
    return ours, backbones


def labels(head: str, rows: int, tokens: int) -> dict[str, Tensor]:
    """What makes the head compute a loss."""
    match head:
        case "QuestionAnswering":
            return {"start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + 2}
        case "TokenClassification":
            return {"labels": torch.randint(0, 3, (rows, tokens))}
        case "MultipleChoice":
            return {"labels": torch.randint(0, 2, (rows,))}
        case "SequenceClassification":
            return {"labels": torch.randint(0, 3, (rows,))}
    return {}


@pytest.mark.parametrize("name", CLASSES)
def test_heads_over_texts(name: str) -> None:
    family, head = name.split("For")
    config = copy.deepcopy(CONFIGS[family])
    config.num_labels = 2 if head == "QuestionAnswering" else 3
    model = build(Tiny(lambda: getattr(T, name)(config), "encoder", attention="eager"))
    ours, backbones = fused(model)
    shape = (3, 2, 7) if head == "MultipleChoice" else (3, 7)
    ids, mask = torch.randint(3, 64, shape), torch.ones(shape, dtype=torch.long)
    mask[1, ..., 4:] = 0
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **labels(head, 3, 7)}
    with torch.no_grad():
        _same_at_real_tokens(ours(**arguments), model(**arguments), mask)
        arguments["output_hidden_states"] = True
        _same_at_real_tokens(ours(**arguments), model(**arguments), mask)
        a, b = (m(**arguments, return_dict=False) for m in (ours, model))
    assert [type(x) for x in a] == [type(y) for y in b]
    assert [len(x) for x in a if isinstance(x, tuple)] == [len(y) for y in b if isinstance(y, tuple)]
    assert [k.calls for k in backbones] == [3]


def _same_at_real_tokens(ours: Any, theirs: Any, mask: Tensor) -> None:
    same(ours, theirs, mask.flatten(0, -2).bool())


def test_multiple_choices_go_through_the_engine() -> None:
    model = build(Tiny(lambda: T.BertForMultipleChoice(T.BertConfig(**BASE)), "encoder"))
    ids = torch.randint(3, 64, (2, 3, 5))
    with torch.no_grad():
        want = model(ids)
        engine = hasten.init_inference(model)
        same(engine(ids), want)
        ids[1, 2, 4] = 67
        with pytest.raises(RequestError, match=r"input_ids\[1, 2, 4\] is 67"):
            engine(ids)


@pytest.mark.parametrize("name", VISION)
def test_heads_over_images(name: str) -> None:
    model = build(Tiny(lambda: getattr(T, name)(VISION[name]), "image"))
    ours, backbones = fused(model)
    size = VISION[name].image_size
    arguments: dict[str, Any] = {"pixel_values": torch.randn(2, 2, size, size), "output_hidden_states": True}
    if not name.endswith("Teacher"):
        arguments["labels"] = torch.tensor([4, 1])
    with torch.no_grad():
        same(ours(**arguments), model(**arguments))
        a, b = (m(**arguments, return_dict=False) for m in (ours, model))
    assert [type(x) for x in a] == [type(y) for y in b]
    assert [k.calls for k in backbones] == [2]


def test_models_of_feature_maps_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Dinov2Backbone answers with the feature maps of single blocks"):
        attach(T.Dinov2Backbone(T.Dinov2Config(**DINO)))
