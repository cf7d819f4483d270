"""The names that code written for DeepSpeed-Inference imports to say how a model is laid out."""

from __future__ import annotations

from hasten.module_inject.replace_policy import (
    BLOOMLayerPolicy,
    DSPolicy,
    GPTNEOXLayerPolicy,
    HFBertLayerPolicy,
    HFCLIPLayerPolicy,
    HFDistilBertLayerPolicy,
    HFGPT2LayerPolicy,
    HFGPTJLayerPolicy,
    HFGPTNEOLayerPolicy,
    HFOPTLayerPolicy,
    InternLMLayerPolicy,
    LLAMA2LayerPolicy,
    LLAMALayerPolicy,
    MegatronLayerPolicy,
    TransformerPolicy,
    UNetPolicy,
    VAEPolicy,
    generic_policies,
    replace_policies,
)

__all__ = [
    "BLOOMLayerPolicy",
    "DSPolicy",
    "GPTNEOXLayerPolicy",
    "HFBertLayerPolicy",
    "HFCLIPLayerPolicy",
    "HFDistilBertLayerPolicy",
    "HFGPT2LayerPolicy",
    "HFGPTJLayerPolicy",
    "HFGPTNEOLayerPolicy",
    "HFOPTLayerPolicy",
    "InternLMLayerPolicy",
    "LLAMA2LayerPolicy",
    "LLAMALayerPolicy",
    "MegatronLayerPolicy",
    "TransformerPolicy",
    "UNetPolicy",
    "VAEPolicy",
    "generic_policies",
    "replace_policies",
]
