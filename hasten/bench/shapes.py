"""Models of well-known shapes with random weights, made on the device: speed does not depend on their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["decoder", "encoder", "image"]


@dataclass(frozen=True, slots=True)
class Shape:
    """A config of transformers, less what it leaves at its default."""

    kind: Kind
    model: str  # names of classes of transformers
    config: str
    fields: Mapping[str, Any]


def _gpt2(**fields: Any) -> Shape:
    return Shape("decoder", "GPT2LMHeadModel", "GPT2Config", fields)


def _gpt_neo(**fields: Any) -> Shape:
    return Shape("decoder", "GPTNeoForCausalLM", "GPTNeoConfig", fields)


def _gptj(**fields: Any) -> Shape:
    return Shape("decoder", "GPTJForCausalLM", "GPTJConfig", fields)


def _llama(**fields: Any) -> Shape:
    return Shape("decoder", "LlamaForCausalLM", "LlamaConfig", fields)


def _qwen3(**fields: Any) -> Shape:
    return Shape("decoder", "Qwen3ForCausalLM", "Qwen3Config", fields)


def _bert(**fields: Any) -> Shape:
    return Shape("encoder", "BertModel", "BertConfig", fields)


def _vit(**fields: Any) -> Shape:
    return Shape("image", "ViTModel", "ViTConfig", fields)


LLAMA3 = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}

SHAPES: dict[str, Shape] = {
    "gpt2": _gpt2(),  # 124M
    "gpt2-medium": _gpt2(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-xl": _gpt2(n_embd=1600, n_layer=48, n_head=25),
    "gpt-neo-2.7b": _gpt_neo(
        hidden_size=2560, num_layers=32, num_heads=20, attention_types=[[["global", "local"], 16]], window_size=256
    ),
    "gpt-j-6b": _gptj(),
    "llama-3.2-1b": _llama(
        **LLAMA3,
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _llama(**LLAMA3, hidden_size=4096, num_hidden_layers=32, intermediate_size=14336),
    "qwen3-0.6b": _qwen3(
        **QWEN3,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=3072,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": _qwen3(
        **QWEN3, hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, intermediate_size=12288
    ),
    "bert-base": _bert(),  # 110M
    "bert-large": _bert(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "minilm": _bert(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "vit-l/16": _vit(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    # of the same architectures, too small to say anything about speed: they try the benchmark itself
    "tiny-gpt2": _gpt2(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=96, **ENDS),
    "tiny-gpt-neo": _gpt_neo(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        vocab_size=96,
        max_position_embeddings=64,
        **ENDS,
    ),
    "tiny-llama": _llama(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=96,
        max_position_embeddings=64,
    ),
    "tiny-bert": _bert(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=96),
    "tiny-vit": _vit(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    ),
}
SMALL: dict[str, str] = {SHAPES[name].config: name for name in SHAPES if name.startswith("tiny-")}
"""The tiny shape of each config class that has one."""


def kind(name: str) -> Kind | None:
    """What the model of a shape's name, or of a folder, does; None for a name that is neither."""
    if name in SHAPES:
        return SHAPES[name].kind
    if not (Path(name) / "config.json").is_file():
        return None
    from hasten.families import FAMILIES

    family = FAMILIES.get(config(name).model_type)
    kinds = set() if family is None else {seam.kind for seam in family.seams.values()}
    return next((k for k in ("decoder", "encoder", "image") if kinds == {k}), None)


def config(name: str) -> Any:
    """transformers' config of a shape, or of the model in a folder."""
    if name not in SHAPES:
        from hasten.cli.load import load_config

        return load_config(name)
    import transformers

    return getattr(transformers, SHAPES[name].config)(**SHAPES[name].fields)


def model_class(name: str) -> Any:
    """transformers' class of the model of a shape or a folder."""
    import transformers

    architectures = [SHAPES[name].model] if name in SHAPES else config(name).architectures
    return getattr(transformers, architectures[0])


def make(name: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The model of a shape with random weights, or that of a folder, in eval. Shapes are made on the device itself."""
    if name not in SHAPES:
        from hasten.cli.load import load_model

        auto = "AutoModelForCausalLM" if kind(name) == "decoder" else None
        return load_model(name, str(dtype).removeprefix("torch."), auto=auto).to(device)
    model = make_empty(name, dtype, device)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            scales = p.ndim == 1 and parameter_name.endswith("weight")  # of a norm
            p.fill_(1.0) if scales else p.normal_(0.0, 0.02)
    return model.eval()


def make_empty(name: str, dtype: torch.dtype, device: torch.device | str = "meta") -> Any:
    """The model without values, in training mode as it is made."""
    with torch.device(device), _default(dtype), _untouched():
        return model_class(name)(config(name))


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _untouched() -> Iterator[None]:
    """Inside, modules are made without the values that they start with: those are written once, above."""
    homes = ("transformers.initialization", "transformers.modeling_utils")  # since transformers 5, and before
    found = (getattr(import_module(h), "no_init_weights", None) for h in homes if find_spec(h))
    with next(f for f in found if f is not None)():
        yield
