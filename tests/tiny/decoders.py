"""GPT-like decoders."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import transformers as T

from tests.tiny.model import Tiny

ENDS: dict[str, Any] = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2}
GPT: dict[str, Any] = {"n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": 64, **ENDS}
WIDE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    **ENDS,
}
GROUPED: dict[str, Any] = {**WIDE, "num_key_value_heads": 2, "intermediate_size": 40}
OPT: dict[str, Any] = {**WIDE, "ffn_dim": 40, "pad_token_id": 1, "bos_token_id": 2}


def gpt2(**more: Any) -> Callable[[], T.PreTrainedModel]:
    return lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT, **more))


def gpt_neo(**more: Any) -> Callable[[], T.PreTrainedModel]:
    kinds = [[["global", "local"], 1], [["local"], 1]]
    return lambda: T.GPTNeoForCausalLM(
        T.GPTNeoConfig(
            hidden_size=36,
            num_layers=3,
            num_heads=3,
            max_position_embeddings=64,
            attention_types=kinds,
            window_size=4,
            **ENDS,
            **more,
        )
    )


def gpt_neox(**more: Any) -> Callable[[], T.PreTrainedModel]:
    sizes = {**WIDE, "num_attention_heads": 3, "intermediate_size": 40}
    return lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**sizes, **more))


def bloom() -> T.PreTrainedModel:
    return T.BloomForCausalLM(T.BloomConfig(hidden_size=48, n_layer=3, n_head=12, pad_token_id=0, **ENDS))


def opt(**more: Any) -> Callable[[], T.PreTrainedModel]:
    return lambda: T.OPTForCausalLM(T.OPTConfig(**(OPT | more)))


def opt_without_final_norm() -> T.PreTrainedModel:
    config = T.OPTConfig(**OPT)
    config._remove_final_layer_norm = True
    return T.OPTForCausalLM(config)


def falcon(**more: Any) -> Callable[[], T.PreTrainedModel]:
    return lambda: T.FalconForCausalLM(T.FalconConfig(**(WIDE | more)))


def mpt(**more: Any) -> Callable[[], T.PreTrainedModel]:
    inner = T.MptConfig(attn_config=more).attn_config
    return lambda: T.MptForCausalLM(
        T.MptConfig(d_model=48, n_layers=3, n_heads=6, max_seq_len=64, attn_config=inner, **ENDS)
    )


def bigcode(**more: Any) -> Callable[[], T.PreTrainedModel]:
    def make() -> T.PreTrainedModel:
        with warnings.catch_warnings():  # transformers 4 calls the deprecated torch.jit.script as it is imported
            warnings.simplefilter("ignore", DeprecationWarning)
            return T.GPTBigCodeForCausalLM(T.GPTBigCodeConfig(**GPT, **more))

    return make


def starcoder2(**more: Any) -> Callable[[], T.PreTrainedModel]:
    return lambda: T.Starcoder2ForCausalLM(T.Starcoder2Config(**GROUPED, **more))


def phi(**more: Any) -> Callable[[], T.PreTrainedModel]:
    return lambda: T.PhiForCausalLM(T.PhiConfig(**GROUPED, **more))


def stablelm(**more: Any) -> Callable[[], T.PreTrainedModel]:
    def make() -> T.PreTrainedModel:
        # transformers 4 fails to initialise norms without bias: torch's own initial values do
        with patch.object(T.StableLmPreTrainedModel, "_init_weights", lambda self, module: None):
            return T.StableLmForCausalLM(T.StableLmConfig(**GROUPED, **more))

    return make


def persimmon(**more: Any) -> Callable[[], T.PreTrainedModel]:
    return lambda: T.PersimmonForCausalLM(T.PersimmonConfig(**WIDE, intermediate_size=40, **more))


def japanese() -> T.PreTrainedModel:
    return T.GPTNeoXJapaneseForCausalLM(T.GPTNeoXJapaneseConfig(**WIDE, intermediate_multiple_size=2))


def xglm(**more: Any) -> Callable[[], T.PreTrainedModel]:
    sizes = {"d_model": 48, "ffn_dim": 40, "num_layers": 3, "attention_heads": 6, "max_position_embeddings": 64}
    return lambda: T.XGLMForCausalLM(T.XGLMConfig(**sizes, **ENDS, pad_token_id=0, **more))


def biogpt() -> T.PreTrainedModel:
    return T.BioGptForCausalLM(T.BioGptConfig(**WIDE, intermediate_size=40, pad_token_id=0))


def openai_gpt() -> T.PreTrainedModel:
    return T.OpenAIGPTLMHeadModel(T.OpenAIGPTConfig(**GPT))


RW: dict[str, Any] = {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}
FORTY: dict[str, Any] = {"new_decoder_architecture": True, "num_kv_heads": 2}

TINY: dict[str, Tiny] = {
    "gpt2": Tiny(gpt2(), "decoder"),
    "gpt2-scales": Tiny(  # transformers 4 forgets the scales under sdpa
        gpt2(scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, n_inner=40), "decoder", attention="eager"
    ),
    "gpt_neo": Tiny(gpt_neo(), "decoder", attention="eager", static=False),
    "gpt_neo-inner": Tiny(
        gpt_neo(intermediate_size=40, tie_word_embeddings=False), "decoder", attention="eager", static=False
    ),
    "gpt_neox": Tiny(gpt_neox(), "decoder"),
    "gpt_neox-sequential": Tiny(gpt_neox(use_parallel_residual=False, attention_bias=False), "decoder"),
    "gptj": Tiny(lambda: T.GPTJForCausalLM(T.GPTJConfig(**GPT, rotary_dim=4)), "decoder", attention="eager"),
    "codegen": Tiny(
        lambda: T.CodeGenForCausalLM(T.CodeGenConfig(**{**GPT, "n_embd": 48, "n_head": 4}, rotary_dim=8, n_inner=40)),
        "decoder",
        attention="eager",
    ),
    "bloom": Tiny(bloom, "decoder", attention="eager"),
    "opt": Tiny(opt(), "decoder"),
    "opt-350m": Tiny(opt(do_layer_norm_before=False, word_embed_proj_dim=20), "decoder"),
    "opt-galactica": Tiny(opt(enable_bias=False, activation_function="gelu"), "decoder"),
    "opt-old": Tiny(opt_without_final_norm, "decoder"),
    "falcon": Tiny(falcon(), "decoder"),
    "falcon-40b": Tiny(falcon(**FORTY), "decoder"),
    "falcon-11b": Tiny(falcon(**FORTY, num_ln_in_parallel_attn=1, ffn_hidden_size=40, bias=True), "decoder"),
    "falcon-rw": Tiny(falcon(**RW, num_attention_heads=12), "decoder", static=False),
    "mpt": Tiny(mpt(), "decoder", attention="eager"),
    "mpt-30b": Tiny(mpt(clip_qkv=0.4, softmax_scale=0.5), "decoder", attention="eager"),
    "gpt_bigcode": Tiny(bigcode(), "decoder"),
    "gpt_bigcode-heads": Tiny(bigcode(multi_query=False, n_inner=40, scale_attn_weights=False), "decoder"),
    "starcoder2": Tiny(starcoder2(sliding_window=8), "decoder"),
    "starcoder2-plain": Tiny(starcoder2(use_bias=False, tie_word_embeddings=False), "decoder"),
    "phi": Tiny(phi(), "decoder"),
    "phi-norms": Tiny(phi(qk_layernorm=True), "decoder"),
    "stablelm": Tiny(stablelm(), "decoder"),
    "stablelm-12b": Tiny(stablelm(qk_layernorm=True, use_parallel_residual=True), "decoder"),
    "stablelm-bias": Tiny(stablelm(use_qkv_bias=True), "decoder"),
    "persimmon": Tiny(persimmon(), "decoder"),
    "persimmon-plain": Tiny(persimmon(qk_layernorm=False), "decoder"),
    "gpt_neox_japanese": Tiny(japanese, "decoder", attention="eager"),
    "xglm": Tiny(xglm(), "decoder", attention="eager", static=False),
    "xglm-unscaled": Tiny(
        xglm(scale_embedding=False, tie_word_embeddings=False), "decoder", attention="eager", static=False
    ),
    "biogpt": Tiny(biogpt, "decoder"),
    "openai-gpt": Tiny(openai_gpt, "decoder", attention="eager"),
}
