"""The policies of DeepSpeed-Inference, under their names there: each says which family a layer class belongs to.

A model that `hasten models` lists needs none. A class of your own that keeps a family's parameter names needs

    class MyPolicy(TransformerPolicy):
        family = "llama"

and `injection_policy={MyDecoderLayer: MyPolicy}`.
"""

from __future__ import annotations

from typing import ClassVar

from hasten.inject.policy import DSPolicy, TransformerPolicy


class HFBertLayerPolicy(TransformerPolicy):
    family, layer, kin = "bert", "BertLayer", ("roberta", "xlm-roberta", "camembert")


class HFDistilBertLayerPolicy(TransformerPolicy):
    family, layer = "distilbert", "TransformerBlock"


class HFCLIPLayerPolicy(TransformerPolicy):
    family, layer, kin = "clip", "CLIPEncoderLayer", ("clip_text_model", "clip_vision_model")


class HFGPT2LayerPolicy(TransformerPolicy):
    family, layer = "gpt2", "GPT2Block"


class HFGPTNEOLayerPolicy(TransformerPolicy):
    family, layer = "gpt_neo", "GPTNeoBlock"


class HFGPTJLayerPolicy(TransformerPolicy):
    family, layer = "gptj", "GPTJBlock"


class GPTNEOXLayerPolicy(TransformerPolicy):
    family, layer = "gpt_neox", "GPTNeoXLayer"


class BLOOMLayerPolicy(TransformerPolicy):
    family, layer = "bloom", "BloomBlock"


class HFOPTLayerPolicy(TransformerPolicy):
    family, layer = "opt", "OPTDecoderLayer"


class LLAMALayerPolicy(TransformerPolicy):
    family, layer = "llama", "LlamaDecoderLayer"


class LLAMA2LayerPolicy(TransformerPolicy):
    family, layer = "llama", "TransformerBlock"
    refusal = "Meta's own llama module is not described: load the same weights as transformers' LlamaForCausalLM"


class InternLMLayerPolicy(TransformerPolicy):
    family, layer = "llama", "InternLMDecoderLayer"
    refusal = "InternLM's own module is not described: load the weights as LlamaForCausalLM with attention_bias=True"


class MegatronLayerPolicy(TransformerPolicy):
    """Megatron-LM's ParallelTransformerLayer, with the settings that DeepSpeed users change on the class.

    version: checkpoint version, which fixes the order of the rows of query_key_value.
    megatron_v2: the rows are grouped by head (versions 2 and 3) whatever `version` says.
    """

    family, layer, kin = "megatron_gpt", "ParallelTransformerLayer", ("megatron_bert",)
    version: ClassVar[float] = 0
    megatron_v2: ClassVar[bool] = True
    use_mup: ClassVar[bool] = False
    moe_type: ClassVar[str] = "standard"

    @classmethod
    def named(cls) -> str:
        version = cls.qkv_version()
        return cls.family if version == 2 else f"{cls.family}-v{version}"

    @classmethod
    def qkv_version(cls) -> int:
        """The Megatron checkpoint version (0, 1 or 2) whose row order the live query_key_value has."""
        return 2 if cls.megatron_v2 else min(int(cls.version), 2)

    @classmethod
    def check(cls) -> str:
        if cls.use_mup:
            return "use_mup=True (maximal update parametrization) is not supported"
        if cls.moe_type != "standard":
            return f"moe_type={cls.moe_type!r} (residual experts) is not supported; 'standard' is"
        return cls.refusal


class UNetPolicy(DSPolicy):
    layer = "UNet2DConditionModel"
    refusal = "diffusion models are outside what Hasten accelerates: it speeds up transformers"


class VAEPolicy(DSPolicy):
    layer = "AutoencoderKL"
    refusal = "diffusion models are outside what Hasten accelerates: it speeds up transformers"


replace_policies: list[type[TransformerPolicy]] = [
    HFBertLayerPolicy,
    HFGPTNEOLayerPolicy,
    GPTNEOXLayerPolicy,
    HFGPTJLayerPolicy,
    MegatronLayerPolicy,
    HFGPT2LayerPolicy,
    BLOOMLayerPolicy,
    HFOPTLayerPolicy,
    HFCLIPLayerPolicy,
    HFDistilBertLayerPolicy,
    LLAMALayerPolicy,
    LLAMA2LayerPolicy,
    InternLMLayerPolicy,
]
generic_policies: list[type[DSPolicy]] = [UNetPolicy, VAEPolicy]
