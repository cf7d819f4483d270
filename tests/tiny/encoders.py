"""BERT-like encoders."""

from __future__ import annotations

import transformers as T

from tests.tiny.model import Tiny

BASE = {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 67,
    "max_position_embeddings": 66,
}

TINY: dict[str, Tiny] = {
    "bert": Tiny(lambda: T.BertForMaskedLM(T.BertConfig(**BASE)), "encoder"),
    "bert-pooled": Tiny(lambda: T.BertModel(T.BertConfig(**BASE)), "encoder"),
    "roberta": Tiny(lambda: T.RobertaForMaskedLM(T.RobertaConfig(**BASE, pad_token_id=1)), "encoder"),
    "xlm-roberta": Tiny(lambda: T.XLMRobertaForMaskedLM(T.XLMRobertaConfig(**BASE, pad_token_id=1)), "encoder"),
    "camembert": Tiny(lambda: T.CamembertForMaskedLM(T.CamembertConfig(**BASE, pad_token_id=1)), "encoder"),
}
