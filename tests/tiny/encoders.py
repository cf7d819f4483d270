"""BERT-like encoders."""

from __future__ import annotations

import transformers as T

from tests.tiny.model import Tiny

SIGLIP_STATES = int(T.__version__.split(".")[0]) >= 5

BASE = {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 67,
    "max_position_embeddings": 66,
}

DISTIL = {
    "dim": 36,
    "n_layers": 3,
    "n_heads": 3,
    "hidden_dim": 40,
    "vocab_size": 67,
    "max_position_embeddings": 66,
}
TEXT = {**BASE, "num_hidden_layers": 4, "projection_dim": 20, "bos_token_id": 1, "pad_token_id": 0}

TINY: dict[str, Tiny] = {
    "bert": Tiny(lambda: T.BertForMaskedLM(T.BertConfig(**BASE)), "encoder"),
    "bert-pooled": Tiny(lambda: T.BertModel(T.BertConfig(**BASE)), "encoder"),
    "bert-unpooled": Tiny(lambda: T.BertModel(T.BertConfig(**BASE), add_pooling_layer=False), "encoder"),
    "roberta": Tiny(lambda: T.RobertaForMaskedLM(T.RobertaConfig(**BASE, pad_token_id=1)), "encoder"),
    "xlm-roberta": Tiny(lambda: T.XLMRobertaForMaskedLM(T.XLMRobertaConfig(**BASE, pad_token_id=1)), "encoder"),
    "camembert": Tiny(lambda: T.CamembertForMaskedLM(T.CamembertConfig(**BASE, pad_token_id=1)), "encoder"),
    "roberta-prelayernorm": Tiny(
        lambda: T.RobertaPreLayerNormModel(T.RobertaPreLayerNormConfig(**BASE, pad_token_id=1)),
        "encoder",
        attention="eager",
    ),
    "xlm-roberta-xl": Tiny(lambda: T.XLMRobertaXLForMaskedLM(T.XLMRobertaXLConfig(**BASE, pad_token_id=1)), "encoder"),
    "data2vec-text": Tiny(
        lambda: T.Data2VecTextModel(T.Data2VecTextConfig(**BASE, pad_token_id=1)), "encoder", attention="eager"
    ),
    "ernie": Tiny(lambda: T.ErnieModel(T.ErnieConfig(**BASE)), "encoder", attention="eager"),
    "distilbert": Tiny(lambda: T.DistilBertForMaskedLM(T.DistilBertConfig(**DISTIL)), "encoder"),
    "electra": Tiny(
        lambda: T.ElectraForPreTraining(T.ElectraConfig(**BASE, embedding_size=20)), "encoder", attention="eager"
    ),
    "electra-generator": Tiny(
        lambda: T.ElectraForMaskedLM(T.ElectraConfig(**BASE, embedding_size=20)), "encoder", attention="eager"
    ),
    "electra-wide": Tiny(
        lambda: T.ElectraModel(T.ElectraConfig(**BASE, embedding_size=36)), "encoder", attention="eager"
    ),
    "albert": Tiny(lambda: T.AlbertForMaskedLM(T.AlbertConfig(**BASE, embedding_size=20)), "encoder"),
    "albert-pooled": Tiny(lambda: T.AlbertModel(T.AlbertConfig(**BASE, embedding_size=36)), "encoder"),
    "mpnet": Tiny(lambda: T.MPNetForMaskedLM(T.MPNetConfig(**BASE, pad_token_id=1)), "encoder", attention="eager"),
    "mpnet-pooled": Tiny(lambda: T.MPNetModel(T.MPNetConfig(**BASE, pad_token_id=1)), "encoder", attention="eager"),
    "clip_text_model": Tiny(lambda: T.CLIPTextModel(T.CLIPTextConfig(**TEXT, eos_token_id=40)), "encoder"),
    "clip_text_model-2": Tiny(lambda: T.CLIPTextModel(T.CLIPTextConfig(**TEXT, eos_token_id=2)), "encoder"),
    "clip_text_model-projected": Tiny(
        lambda: T.CLIPTextModelWithProjection(T.CLIPTextConfig(**TEXT, eos_token_id=40)), "encoder"
    ),
    "siglip_text_model": Tiny(
        lambda: T.SiglipTextModel(T.SiglipTextConfig(**BASE, projection_size=20, bos_token_id=1, eos_token_id=2)),
        "encoder",
        states=SIGLIP_STATES,
    ),
}
