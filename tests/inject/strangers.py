"""Models that no family describes: a user's own classes, and tiny ones of transformers' that have a tp_plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

WIDTH = 24


class Attention(nn.Module):
    """Query, key and value separate, or (fused) one linear whose outputs lie one behind another."""

    def __init__(self, heads: int, kv_heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.hidden = heads, kv_heads, WIDTH // heads, WIDTH
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, kv_heads * self.size)
            self.value = nn.Linear(WIDTH, kv_heads * self.size)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.query(x), self.key(x), self.value(x))
        counts = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (y.view(*x.shape[:2], n, self.size).transpose(1, 2) for y, n in zip(parts, counts, strict=True))
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], self.hidden))


class Block(nn.Module):
    def __init__(self, heads: int, kv_heads: int, fused: bool) -> None:
        super().__init__()
        self.attention = Attention(heads, kv_heads, fused)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.up, self.down = nn.Linear(WIDTH, 52), nn.Linear(52, WIDTH)
        self.act, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norms[0](x)))
        return x + self.dropout(self.down(self.act(self.up(self.norms[1](x)))))


class Own(nn.Module):
    """A decoder of the user's, its head tied to its table, with a buffer."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, fused: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(51, WIDTH), nn.Embedding(40, WIDTH)
        self.blocks = nn.ModuleList([Block(heads, kv_heads, fused) for _ in range(3)])
        self.head = nn.Linear(WIDTH, 51, bias=False)
        self.register_buffer("scale", torch.tensor(0.7))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale


class Fussy(nn.Module):
    """In half precision it computes nothing narrow, as some kernels do not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if x.dtype != torch.float32 and y.shape[-1] < 8:
            raise RuntimeError("too narrow")
        return x + self.down(y.sigmoid())


class Reader(nn.Module):
    """An encoder in BERT's manner, which says itself what it takes; its experts are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(53, WIDTH), nn.Embedding(2, WIDTH)
        self.layers = nn.ModuleList([ReaderLayer() for _ in range(2)])
        self.pooler, self.classes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 52, 0, 0]])
        return {"words": ids, "mask": (ids > 0).long(), "types": ids % 2}

    def forward(self, words: Tensor, mask: Tensor, types: Tensor) -> dict[str, Tensor]:
        x = self.words(words) + self.types(types)
        for layer in self.layers:
            x = layer(x, (1.0 - mask[:, None, None].to(x.dtype)) * -1e4)
        return {"hidden": x, "logits": self.classes(self.pooler(x[:, 0]).tanh())}


class ReaderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 4, 7, 28
        self.query, self.key, self.value = (nn.Linear(WIDTH, 28) for _ in range(3))
        self.dense, self.norm = nn.Linear(28, WIDTH), nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList([nn.Sequential(Conv1D(20, WIDTH), nn.GELU(), Conv1D(WIDTH, 20)) for _ in range(3)])

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        heads = (*x.shape[:2], self.num_attention_heads, self.attention_head_size)
        q, k, v = (linear(x).view(heads).permute(0, 2, 1, 3) for linear in (self.query, self.key, self.value))
        weights = (q @ k.mT / math.sqrt(self.attention_head_size) + hidden).softmax(-1)
        met = (weights @ v).permute(0, 2, 1, 3).contiguous()
        x = self.norm(x + self.dense(met.view(*x.shape[:2], self.all_head_size)))
        flat, chosen = x.flatten(0, 1), self.router(x).flatten(0, 1).argmax(-1)
        given = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            given[chosen == k] = expert(flat[chosen == k])
        return x + given.view_as(x)


NAMES: dict[type[nn.Module], tuple[str, ...]] = {Block: ("attention.out", "down")}
SMALL = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
EXPERTS |= {"first_k_dense_replace": 1, "n_shared_experts": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}

_SIZES: Mapping[str, dict[str, Any]] = {
    "olmo": {"clip_qkv": 0.4},
    "apertus": {},
    "nanochat": {},
    "jais2": {},
    "glm4_moe": {**EXPERTS, "use_qk_norm": True},
    "deepseek_v3": {**EXPERTS, **LATENT, "num_key_value_heads": 4, "head_dim": 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
}
DECLARED = {kind: sizes for kind, sizes in _SIZES.items() if kind in CONFIG_MAPPING}
"""transformers' model types with a tp_plan and no family, and the sizes that they have besides."""


def perturbed(model: Any) -> Any:
    """The model with no parameter that changes nothing: biases and norms too are random."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(torch.randn(p.shape, generator=draw) * 0.2)
    return model


def declared(kind: str, **sizes: int) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SMALL | DECLARED[kind] | sizes))
    return perturbed(AutoModelForCausalLM.from_config(config)).eval()


def own(**how: Any) -> Own:
    torch.manual_seed(0)
    return perturbed(Own(**how)).eval()


def reader() -> Reader:
    torch.manual_seed(0)
    return perturbed(Reader()).eval()


MODELS: dict[str, Callable[[], Any]] = {
    **{kind: (lambda kind=kind: declared(kind)) for kind in DECLARED},
    "own": own,
    "own fused": lambda: own(fused=True, kv_heads=4),
    "own odd": lambda: own(heads=3, kv_heads=3),
    "own in training": lambda: own(tied=False).train(),
    "reader": reader,
}
