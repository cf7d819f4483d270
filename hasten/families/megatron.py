"""Megatron: transformers' MegatronBert, and the GPT and BERT modules of Megatron-LM itself, live.

The rows of Megatron-LM's query_key_value are ordered by checkpoint version (megatron/checkpointing.py): 0 has all of
q, then k, then v; 1 has q, k and v in turn row by row; 2 and later in turn head by head. The shapes do not tell them
apart, so that each order is a family of its own, and MegatronLayerPolicy's settings choose.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from hasten.families.bert import BERT, ENCODER, block, norm
from hasten.families.family import Family, Seam, one
from hasten.families.live_megatron import read
from hasten.spec import Attention, Block, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import GROUPED, SEQUENTIAL, STRIDED, Dialect, Packed, Packing

PRE_NORM_BERT = Dialect(
    "megatron-bert",
    BERT.block,
    {
        **BERT.slots,
        "attn_norm": "attention.ln",
        "mlp_norm": "ln",
        "final_norm": "encoder.ln",
        "pooler": "pooler.dense",
        "mlm": "/cls.predictions.transform.dense",
        "mlm_norm": "/cls.predictions.transform.LayerNorm",
        "mlm_logits": "/cls.predictions",
        "pairs": "/cls.seq_relationship",
    },
)
ACT = {
    "gelu": "gelu",
    "erf_gelu": "gelu",
    "openai_gelu": "gelu_tanh",
    "bias_gelu": "gelu_tanh",
    "squared_relu": "relu2",
}
PLAIN = "the classic GPT and BERT layer is described, nothing beyond"
REFUSED = {
    "apply_residual_connection_post_layernorm": (False,),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "normalization": ("LayerNorm", "layernorm"),
    "position_embedding_type": ("learned_absolute",),
    "use_rotary_position_embeddings": (False,),
    "gated_linear_unit": (False,),
    "swiglu": (False,),
    "add_bias_linear": (True,),
    "group_query_attention": (False,),
    "num_moe_experts": (),
    "num_experts": ([1],),
    "window_size": (),
    "tensor_model_parallel_size": (1,),
    "pipeline_model_parallel_size": (1,),
    "sequence_parallel": (False,),
}
"""Fields of Megatron-LM's configs and arguments, and the values of them that are described."""


def megatron_bert(c: Config) -> Tower:
    """NVIDIA's BERT in transformers: norms before the sublayers and behind the last one, none behind the embedding."""
    c.default("tie_word_embeddings", True)  # the head stays the model's own
    width = c.take("hidden_size")
    e = Tokens(c.take("vocab_size"), width, c.take("max_position_embeddings"), types=c.take("type_vocab_size"))
    return Tower(width, e, (replace(block(c), order="pre"),) * c.take("num_hidden_layers"), norm(c))


def live(c: Config, *, causal: bool) -> Tower:
    """A live TransformerLanguageModel, from what live_megatron.read finds; its heads stay its own."""
    for name, allowed in REFUSED.items():
        c.refuse(name, *allowed, why=PLAIN)
    width, heads = c.take("hidden_size"), c.take("num_attention_heads")
    d = c.default("kv_channels", width // heads)
    n = Norm("layer", c.take("layernorm_epsilon"), bias=True)
    a = Attention(heads, heads, d, d**-0.5, causal=c.default("causal", causal), bias="qkvo")
    mlp = Mlp(c.default("ffn_hidden_size", 4 * width), c.choose("activation_func", ACT), gated=False, bias=True)
    e = Tokens(c.take("padded_vocab_size"), width, c.take("max_position_embeddings"), types=c.take("num_tokentypes"))
    return Tower(width, e, (Block(a, mlp, n, "pre"),) * c.take("num_layers"), n)


def dialect(name: str, packing: Packing, stack: str, attention: str) -> Dialect:
    return Dialect(
        f"{name} ({stack}, {attention})",
        f"{stack}.layers.{{i}}.",
        {
            "tokens": "embedding.word_embeddings",
            "positions": "embedding.position_embeddings",
            "types": "embedding.tokentype_embeddings",
            "final_norm": f"{stack}.final_layernorm",
            "attn_norm": "input_layernorm",
            "qkv": Packed(f"{attention}.query_key_value", packing),
            "out": f"{attention}.dense",
            "mlp_norm": "post_attention_layernorm",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
    )


def family(name: str, causal: bool, packing: Packing, classes: str) -> Family:
    names = [
        (stack, attention) for stack in ("encoder", "transformer") for attention in ("self_attention", "attention")
    ]
    seam = Seam("megatron", ("language_model", "module.language_model"), keeps=("pooler", "output_layer"))
    made = one(partial(live, causal=causal), *(dialect(name, packing, *n) for n in names), seam=seam, classes=classes)
    return replace(made, read=read)


VERSIONS = {
    "": (GROUPED, ""),
    "-v1": (STRIDED, ", checkpoint version 1"),
    "-v0": (SEQUENTIAL, ", checkpoint version 0"),
}

FAMILIES: dict[str, Family] = {
    "megatron-bert": one(megatron_bert, PRE_NORM_BERT, seam=ENCODER, classes="Megatron-BERT 345M"),
    **{
        f"{name}{suffix}": family(f"{name}{suffix}", causal, packing, f"Megatron-LM's {classes}{version}")
        for name, causal, classes in (("megatron_gpt", True, "GPTModel"), ("megatron_bert", False, "BertModel"))
        for suffix, (packing, version) in VERSIONS.items()
    },
}
