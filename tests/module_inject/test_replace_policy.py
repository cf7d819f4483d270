"""Policies of DeepSpeed-Inference: importable under their names; each comes to its family or to a clear error."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.distilbert.modeling_distilbert import TransformerBlock
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoBlock
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.models.t5.modeling_t5 import T5Block

import hasten.module_inject as module_inject
from hasten.errors import ConfigError, UnsupportedModel
from hasten.inject.options import Options
from hasten.inject.policy import resolve_policy, validate_policy
from hasten.module_inject import replace_policy
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

NAMES = [
    *("HFBertLayerPolicy", "HFDistilBertLayerPolicy", "HFCLIPLayerPolicy", "HFGPT2LayerPolicy", "HFGPTNEOLayerPolicy"),
    *("HFGPTJLayerPolicy", "MegatronLayerPolicy", "GPTNEOXLayerPolicy", "BLOOMLayerPolicy", "HFOPTLayerPolicy"),
    *("LLAMALayerPolicy", "LLAMA2LayerPolicy", "InternLMLayerPolicy", "UNetPolicy", "VAEPolicy"),
    *("DSPolicy", "TransformerPolicy", "replace_policies", "generic_policies"),
]
KNOWN = ("gpt2", "gpt_neo", "bert", "roberta", "llama", "distilbert", "clip", "clip_text_model", "opt", "t5")

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 31}


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=31, n_positions=16))


MODELS = {
    "gpt2": (GPT2Block, HFGPT2LayerPolicy, gpt2),
    "gpt_neo": (
        GPTNeoBlock,
        HFGPTNEOLayerPolicy,
        lambda: GPTNeoModel(
            GPTNeoConfig(hidden_size=8, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])
        ),
    ),
    "bert": (BertLayer, HFBertLayerPolicy, lambda: BertModel(BertConfig(**SMALL))),
    "roberta": (RobertaLayer, HFBertLayerPolicy, lambda: RobertaModel(RobertaConfig(**SMALL))),
    "llama": (LlamaDecoderLayer, LLAMALayerPolicy, lambda: LlamaForCausalLM(LlamaConfig(**SMALL))),
    "distilbert": (
        TransformerBlock,
        HFDistilBertLayerPolicy,
        lambda: DistilBertModel(DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=12, vocab_size=31)),
    ),
    "opt": (
        OPTDecoderLayer,
        HFOPTLayerPolicy,
        lambda: OPTForCausalLM(
            OPTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=12, word_embed_proj_dim=8)
        ),
    ),
    "clip_text_model": (CLIPEncoderLayer, HFCLIPLayerPolicy, lambda: CLIPTextModel(CLIPTextConfig(**SMALL))),
}


class MyBlock(nn.Module):
    """A layer of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


class MyModel(nn.Module):
    """A model of a user's own, without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, 8)
        self.blocks = nn.ModuleList([MyBlock(), MyBlock()])


class MyPolicy(TransformerPolicy):
    family = "llama"


def message(error: type[Exception], model: nn.Module, policy: object, known: tuple[str, ...] = KNOWN) -> str:
    with pytest.raises(error) as caught:
        resolve_policy(model, policy, known)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_deepspeed_can_be_imported_from_both_places(name):
    assert getattr(replace_policy, name) is getattr(module_inject, name)
    assert name in module_inject.__all__


def test_the_lists_hold_every_policy_once():
    policies = {value for name in NAMES if isinstance(value := getattr(replace_policy, name), type)}
    assert {*replace_policies, *generic_policies} == policies - {DSPolicy, TransformerPolicy}
    assert len(replace_policies) == 13 and len(generic_policies) == 2


@pytest.mark.parametrize("policy", replace_policies, ids=lambda policy: policy.__name__)
def test_every_transformer_policy_names_a_family_and_a_layer(policy):
    assert policy.family and policy.layer and issubclass(policy, TransformerPolicy)


@pytest.mark.parametrize("family", MODELS)
def test_a_policy_comes_to_the_family_of_the_model(family):
    layer, policy, make = MODELS[family]
    assert resolve_policy(make(), {layer: policy}, KNOWN) == family
    assert resolve_policy(make(), {layer: policy}) == family
    assert policy.layer == layer.__name__ or family == "roberta"


def test_without_a_policy_no_family_is_named():
    assert resolve_policy(gpt2(), None, KNOWN) is None
    assert resolve_policy(gpt2(), {}, KNOWN) is None


def test_names_of_linears_name_no_family_and_are_checked():
    bert = MODELS["bert"][2]()
    assert resolve_policy(bert, {BertLayer: ("attention.output.dense", "output.dense")}, KNOWN) is None
    assert resolve_policy(gpt2(), {GPT2Block: ("attn.c_proj", "mlp.c_proj")}, KNOWN) is None


def test_t5s_names_fit_although_only_the_decoder_has_cross_attention():
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, vocab_size=31))
    validate_policy(t5, {T5Block: ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")})


def test_an_embedding_inside_a_layer_is_no_linear():
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, vocab_size=31))
    text = message(ConfigError, t5, {T5Block: ("SelfAttention.relative_attention_bias",)})
    assert "'SelfAttention.relative_attention_bias' is no linear of T5Block" in text and "SelfAttention.q" in text


@pytest.mark.parametrize("name", ["output.dens", "utput.dense", "LayerNorm", "attention", "nothing"])
def test_a_name_that_is_no_linear_is_refused_with_those_there_are(name):
    bert = MODELS["bert"][2]()
    text = message(ConfigError, bert, {BertLayer: ("output.dense", name)})
    assert f"{name!r} is no linear of BertLayer" in text and "'output.dense' is" not in text
    assert "attention.self.query" in text and "intermediate.dense" in text and "LayerNorm," not in text


def test_a_leading_dot_of_a_name_is_ignored():
    options = Options.parse(injection_policy={GPT2Block: ".mlp.c_proj"})
    assert options.injection_policy == {GPT2Block: ("mlp.c_proj",)}
    validate_policy(gpt2(), options.injection_policy)


def test_a_layer_class_that_is_not_in_the_model_is_refused_with_those_that_are():
    text = message(ConfigError, gpt2(), {BertLayer: HFBertLayerPolicy})
    assert "BertLayer is not in GPT2LMHeadModel, whose layers are GPT2Block" in text
    text = message(ConfigError, nn.Sequential(nn.Linear(2, 2)), {BertLayer: ("output.dense",)})
    assert "whose layers are Linear, Sequential" in text


def test_all_misfits_of_a_policy_are_reported_at_once():
    policy = {BertLayer: HFBertLayerPolicy, GPT2Block: ("mlp.c_prj", "attn.c_proj", "x")}
    text = message(ConfigError, gpt2(), policy)
    assert "BertLayer is not in" in text and "'mlp.c_prj'" in text and "'x'" in text


def test_a_policy_that_contradicts_the_models_config_is_refused():
    text = message(ConfigError, MODELS["opt"][2](), {OPTDecoderLayer: LLAMALayerPolicy})
    assert "says llama (LLAMALayerPolicy), but the model's config says opt" in text


def test_two_policies_of_one_model_agree_or_are_refused():
    class Other(nn.Module):
        """A second layer class."""

    model = MyModel()
    model.blocks.append(Other())
    assert resolve_policy(model, {MyBlock: MyPolicy, Other: LLAMALayerPolicy}, KNOWN) == "llama"
    assert "several families for one model: gpt2, llama" in message(
        ConfigError, model, {MyBlock: MyPolicy, Other: HFGPT2LayerPolicy}
    )


def test_a_users_own_layer_takes_the_family_that_its_policy_names():
    assert resolve_policy(MyModel(), {MyBlock: MyPolicy}, KNOWN) == "llama"
    assert resolve_policy(MyModel(), {MyBlock: HFGPT2LayerPolicy}, KNOWN) == "gpt2"


def test_a_model_of_unknown_type_takes_the_family_that_its_policy_names():
    model = MODELS["llama"][2]()
    model.config.model_type = "my_llama"
    assert resolve_policy(model, {LlamaDecoderLayer: LLAMALayerPolicy}, KNOWN) == "llama"


@pytest.mark.parametrize(
    ("family", "hint"), [("lama", "did you mean 'llama'?"), ("", "`hasten models` lists"), (3, "`hasten models` lists")]
)
def test_a_policy_without_a_family_that_exists_is_refused(family, hint):
    policy = type("Mine", (TransformerPolicy,), {"family": family})
    text = message(ConfigError, MyModel(), {MyBlock: policy})
    assert f"Mine.family={family!r} is not a family" in text and hint in text


@pytest.mark.parametrize("policy", [UNetPolicy, VAEPolicy, LLAMA2LayerPolicy, InternLMLayerPolicy])
def test_policies_of_models_that_are_not_accelerated_say_why(policy):
    assert Options.parse(injection_policy={MyBlock: policy}).injection_policy == {MyBlock: policy}
    text = message(UnsupportedModel, MyModel(), {MyBlock: policy})
    assert text == f"{policy.__name__}: {policy.refusal}" and len(policy.refusal) > 40


def test_megatrons_class_attributes_keep_deepspeeds_defaults():
    policy = MegatronLayerPolicy
    assert (policy.version, policy.megatron_v2, policy.use_mup, policy.moe_type) == (0, True, False, "standard")


@pytest.mark.parametrize(
    ("version", "megatron_v2", "wanted"), [(0, True, 2), (0, False, 0), (1.0, False, 1), (2.0, False, 2), (3, False, 2)]
)
def test_megatrons_rows_follow_its_version_unless_they_are_grouped(version, megatron_v2, wanted):
    policy = type("Mine", (MegatronLayerPolicy,), {"version": version, "megatron_v2": megatron_v2})
    assert policy.qkv_version() == wanted


@pytest.mark.parametrize(("attribute", "value"), [("use_mup", True), ("moe_type", "residual")])
def test_megatron_settings_that_are_not_supported_are_refused(attribute, value):
    policy = type("Mine", (MegatronLayerPolicy,), {attribute: value})
    assert f"Mine: {attribute}={value!r}" in message(UnsupportedModel, MyModel(), {MyBlock: policy}, ())


def test_resolving_changes_nothing_in_the_model():
    model = gpt2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resolve_policy(model, {GPT2Block: HFGPT2LayerPolicy}, KNOWN)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("policy", [HFGPTJLayerPolicy, GPTNEOXLayerPolicy, BLOOMLayerPolicy])
def test_the_remaining_policies_name_the_model_type_of_transformers(policy):
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    assert policy.family in MODEL_MAPPING_NAMES
