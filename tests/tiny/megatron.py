"""Pre-norm BERT of transformers, and GPT and BERT modules with the names, calls and layouts of Megatron-LM's."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

from tests.tiny import encoders
from tests.tiny.model import Tiny

BASE: dict[str, Any] = encoders.BASE

TINY: dict[str, Tiny] = {
    "megatron-bert": Tiny(
        lambda: T.MegatronBertForMaskedLM(T.MegatronBertConfig(**BASE)), "encoder", attention="eager"
    ),
    "megatron-bert-pooled": Tiny(
        lambda: T.MegatronBertModel(T.MegatronBertConfig(**BASE)), "encoder", attention="eager"
    ),
}

WIDTH, HEADS, LAYERS, VOCAB, POSITIONS = 36, 3, 3, 70, 24


class AttnMaskType(enum.Enum):
    padding = 1
    causal = 2


@dataclass(frozen=True)
class Era:
    """What changed over the years: the order of query_key_value's rows, names, and where axes are swapped."""

    version: int = 2
    stack: str = "encoder"
    attention: str = "self_attention"
    tokens_first: bool = True
    gelu: str = "plain"  # or "fused", "openai"
    says_mask_type: bool = True


def openai_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)))


class ColumnParallelLinear(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x), None


class ParallelAttention(nn.Module):
    def __init__(self, era: Era) -> None:
        super().__init__()
        self.era = era
        self.query_key_value = ColumnParallelLinear(WIDTH, 3 * WIDTH)
        self.dense = ColumnParallelLinear(WIDTH, WIDTH)

    def split(self, y: Tensor) -> list[Tensor]:
        """(tokens, batch, 3 width) to three times (tokens, batch, heads, head width)."""
        s, b, _ = y.shape
        match self.era.version:
            case 0:
                return [t.view(s, b, HEADS, -1) for t in y.split(WIDTH, -1)]
            case 1:
                return list(y.view(s, b, HEADS, WIDTH // HEADS, 3).unbind(-1))
            case _:
                return list(y.view(s, b, HEADS, -1).chunk(3, -1))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(x)
        q, k, v = self.split(self.query_key_value(x)[0])
        for row in range(x.shape[1]):
            hidden = mask[row if len(mask) > 1 else 0, 0]
            heads = []
            for h in range(HEADS):
                scores = q[:, row, h] @ k[:, row, h].T / math.sqrt(WIDTH // HEADS)
                heads.append(scores.masked_fill(hidden, -10000.0).softmax(-1) @ v[:, row, h])
            out[:, row] = torch.cat(heads, -1)
        return self.dense(out)


class ParallelMLP(nn.Module):
    def __init__(self, era: Era) -> None:
        super().__init__()
        self.dense_h_to_4h = ColumnParallelLinear(WIDTH, 4 * WIDTH)
        self.dense_4h_to_h = ColumnParallelLinear(4 * WIDTH, WIDTH)
        self.bias_gelu_fusion = era.gelu == "fused"
        self.activation_func = openai_gelu if era.gelu == "openai" else F.gelu

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        y, _ = self.dense_h_to_4h(x)
        return self.dense_4h_to_h(openai_gelu(y) if self.bias_gelu_fusion else self.activation_func(y))


class ParallelTransformerLayer(nn.Module):
    def __init__(self, era: Era, kind: AttnMaskType) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.add_module(era.attention, ParallelAttention(era))
        self.mlp, self.name = ParallelMLP(era), era.attention
        if era.says_mask_type:
            self.self_attn_mask_type = kind

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + getattr(self, self.name)(self.input_layernorm(x), mask)[0]
        return x + self.mlp(self.post_attention_layernorm(x))[0]


class ParallelTransformer(nn.Module):
    def __init__(self, era: Era, kind: AttnMaskType) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ParallelTransformerLayer(era, kind) for _ in range(LAYERS))
        self.final_layernorm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_layernorm(x)


class Embedding(nn.Module):
    def __init__(self, era: Era, types: int) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(VOCAB, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.tokentype_embeddings = nn.Embedding(types, WIDTH) if types else None
        self.tokens_first = era.tokens_first

    def forward(self, input_ids: Tensor, position_ids: Tensor, tokentype_ids: Tensor | None = None) -> Tensor:
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        if self.tokentype_embeddings is not None:
            x = x + self.tokentype_embeddings(tokentype_ids)
        return x.transpose(0, 1).contiguous() if self.tokens_first else x


class Pooler(nn.Module):
    def __init__(self, era: Era) -> None:
        super().__init__()
        self.dense, self.axis = nn.Linear(WIDTH, WIDTH), 0 if era.tokens_first else 1

    def forward(self, hidden_states: Tensor, sequence_index: int = 0) -> Tensor:
        return self.dense(hidden_states.select(self.axis, sequence_index)).tanh()


class TransformerLanguageModel(nn.Module):
    def __init__(self, era: Era, kind: AttnMaskType, types: int, add_pooler: bool) -> None:
        super().__init__()
        self.embedding = Embedding(era, types)
        self.add_module(era.stack, ParallelTransformer(era, kind))
        self.era, self.add_pooler = era, add_pooler
        if add_pooler:
            self.pooler = Pooler(era)

    def forward(
        self,
        enc_input_ids: Tensor,
        enc_position_ids: Tensor,
        enc_attn_mask: Tensor,
        tokentype_ids: Tensor | None = None,
        inference_params: Any = None,
        pooling_sequence_index: int = 0,
    ) -> Any:
        x = self.embedding(enc_input_ids, enc_position_ids, tokentype_ids)
        x = x if self.era.tokens_first else x.transpose(0, 1)
        x = getattr(self, self.era.stack)(x, enc_attn_mask)
        x = x if self.era.tokens_first else x.transpose(0, 1).contiguous()
        return (x, self.pooler(x, pooling_sequence_index)) if self.add_pooler else x


def config(**more: Any) -> SimpleNamespace:
    """The fields of Megatron-LM's TransformerConfig that say what a layer computes."""
    fields = {"num_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "layernorm_epsilon": 1e-5}
    neutral = {"kv_channels": WIDTH // HEADS, "ffn_hidden_size": 4 * WIDTH, "apply_query_key_layer_scaling": True}
    return SimpleNamespace(**{**fields, **neutral, "normalization": "LayerNorm", "add_bias_linear": True, **more})


class GPTModel(nn.Module):
    def __init__(self, era: Era, **more: Any) -> None:
        super().__init__()
        self.config = config(**more)
        self.language_model = TransformerLanguageModel(era, AttnMaskType.causal, 0, False)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        x = self.language_model(input_ids, position_ids, attention_mask)
        x = x.transpose(0, 1) if self.language_model.era.tokens_first else x
        logits = F.linear(x, self.language_model.embedding.word_embeddings.weight)
        return logits if labels is None else F.cross_entropy(logits.mT, labels, reduction="none")


class BertModel(nn.Module):
    def __init__(self, era: Era, **more: Any) -> None:
        super().__init__()
        self.config = config(**more)
        self.language_model = TransformerLanguageModel(era, AttnMaskType.padding, 2, True)
        self.binary_head = nn.Linear(WIDTH, 2)

    def forward(
        self, bert_model_input: Tensor, attention_mask: Tensor, tokentype_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        hidden = (attention_mask[:, None, :, None] * attention_mask[:, None, None, :]) < 0.5
        places = torch.arange(bert_model_input.shape[1])[None].expand_as(bert_model_input)
        x, pooled = self.language_model(bert_model_input, places, hidden, tokentype_ids=tokentype_ids)
        x = x.transpose(0, 1) if self.language_model.era.tokens_first else x
        return F.linear(x, self.language_model.embedding.word_embeddings.weight), self.binary_head(pooled)


class Float16Module(nn.Module):
    """What Megatron-LM wraps around a model in half precision: logits come back in float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **more: Any) -> Tensor:
        return self.module(*inputs, **more).float()


def build_megatron(kind: type[GPTModel] | type[BertModel], era: Era, **more: Any) -> Any:
    """The same model at every call, no bias zero and no norm the identity."""
    torch.manual_seed(0)
    model = kind(era, **more).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model
