"""Encoder-decoders, of text and of speech."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T

from tests.tiny.model import Tiny

BART = {
    "d_model": 36,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 44,
    "vocab_size": 67,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": 36,
    "d_kv": 8,
    "d_ff": 44,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "vocab_size": 67,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


def text() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 64, (2, 9)), "decoder_input_ids": torch.randint(3, 64, (2, 5))}


def speech() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(3, 64, (2, 5))}


def bart(model: Any, config: Any, **more: Any) -> Tiny:
    return Tiny(lambda: model(config(**BART | more)), "seq2seq", own=text)


def t5(model: Any, config: Any, **more: Any) -> Tiny:
    return Tiny(lambda: model(config(**T5 | more)), "seq2seq", own=text)


def _whisper() -> Any:
    more = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64, "begin_suppress_tokens": None}
    return T.WhisperForConditionalGeneration(T.WhisperConfig(**BART | more))


TINY: dict[str, Tiny] = {
    "t5": t5(T.T5ForConditionalGeneration, T.T5Config),
    "t5-gated": t5(T.T5ForConditionalGeneration, T.T5Config, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": t5(T.MT5ForConditionalGeneration, T.MT5Config, tie_word_embeddings=False),
    "bart": bart(T.BartForConditionalGeneration, T.BartConfig),
    "bart-scaled": bart(T.BartForConditionalGeneration, T.BartConfig, scale_embedding=True),
    "mbart": bart(T.MBartForConditionalGeneration, T.MBartConfig),
    "plbart": bart(T.PLBartForConditionalGeneration, T.PLBartConfig),
    "marian": bart(T.MarianMTModel, T.MarianConfig, scale_embedding=True),
    "pegasus": bart(T.PegasusForConditionalGeneration, T.PegasusConfig),
    "blenderbot": bart(T.BlenderbotForConditionalGeneration, T.BlenderbotConfig),
    "m2m_100": bart(T.M2M100ForConditionalGeneration, T.M2M100Config),
    "whisper": Tiny(_whisper, "speech", own=speech),
}
