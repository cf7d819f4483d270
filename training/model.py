"""The model: a Llama that may begin shallow and grow; few layers learn the commonest things at a part of the cost."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from training.plan import Plan

VOCABULARY = 4096
END_OF_TEXT = 0  # its token


def build(plan: Plan, layers: int) -> LlamaForCausalLM:
    """A Llama with heads of 64, a third as many key-value heads, and branches that start at zero."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=plan.width,
        intermediate_size=math.ceil(plan.width * 8 / 3 / 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=plan.width // 64,
        num_key_value_heads=max(1, plan.width // 192),
        max_position_embeddings=plan.length,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        use_cache=False,
    )
    torch.manual_seed(plan.seed)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        silence(layer)
    if plan.dropout:
        regularise(model, plan.dropout)
    return model


def regularise(model: LlamaForCausalLM, dropout: float) -> None:
    """While the model trains, drop that part of the embeddings and of what attention and feed-forward add to them.

    Hooks do it, for a Llama has no such modules, and the names of its weights are to stay.
    """

    def drop(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return functional.dropout(output, dropout, module.training)

    outputs = [model.model.embed_tokens]
    for layer in model.model.layers:
        outputs += [layer.self_attn.o_proj, layer.mlp.down_proj]
    for module in outputs:
        module.register_forward_hook(drop)


def grow(model: LlamaForCausalLM, plan: Plan) -> LlamaForCausalLM:
    """A deeper model that computes the same: behind every layer stand copies of it that are silent at first."""
    grown = build(plan, plan.grown).to(model.device)
    grown.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    grown.model.norm.load_state_dict(model.model.norm.state_dict())
    copies = plan.grown // len(model.model.layers)
    for i, layer in enumerate(grown.model.layers):
        layer.load_state_dict(model.model.layers[i // copies].state_dict())
        if i % copies:
            silence(layer)
    return grown


def depth(weights: dict[str, Tensor]) -> int:
    """The number of layers in a state dict."""
    return len({name.split(".")[2] for name in weights if name.startswith("model.layers.")})


@torch.no_grad()
def silence(layer: nn.Module) -> None:
    """Make the layer pass its input on as it is."""
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
