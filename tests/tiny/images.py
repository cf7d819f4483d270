"""Vision transformers, alone and beside a text tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T

from tests.tiny.encoders import SIGLIP_STATES, TEXT
from tests.tiny.model import Tiny

BASE = {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
}
DINO = {k: v for k, v in BASE.items() if k != "intermediate_size"} | {"mlp_ratio": 2, "image_size": 16}
SIGLIP_TEXT = {k: v for k, v in TEXT.items() if k != "projection_dim"} | {"projection_size": 36, "eos_token_id": 2}


def images(rows: int = 2, size: int = 12) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(rows, 2, size, size)}


def images_and_texts() -> dict[str, Any]:
    """Enough of both for an error's mean to say something: a pair gives a single number."""
    return {"pixel_values": torch.randn(7, 2, 12, 12), "input_ids": torch.randint(3, 64, (11, 7))}


def clip() -> T.CLIPConfig:
    return T.CLIPConfig(text_config={**TEXT, "eos_token_id": 40}, vision_config=BASE, projection_dim=20)


def siglip() -> T.SiglipConfig:
    return T.SiglipConfig(text_config=SIGLIP_TEXT, vision_config=BASE)


def chinese_clip() -> T.ChineseCLIPConfig:
    text = {**TEXT, "num_hidden_layers": 3}
    return T.ChineseCLIPConfig(text_config=text, vision_config=BASE, projection_dim=20)


def beit(**flags: Any) -> T.BeitConfig:
    return T.BeitConfig(**BASE, vocab_size=67, **flags)


TINY: dict[str, Tiny] = {
    "vit": Tiny(lambda: T.ViTModel(T.ViTConfig(**BASE)), "image", own=images()),
    "vit-classes": Tiny(
        lambda: T.ViTForImageClassification(T.ViTConfig(**BASE, qkv_bias=False)), "image", own=images()
    ),
    "vit-masked": Tiny(
        lambda: T.ViTForMaskedImageModeling(T.ViTConfig(**BASE, encoder_stride=4)), "image", own=images()
    ),
    "vit_msn": Tiny(lambda: T.ViTMSNModel(T.ViTMSNConfig(**BASE)), "image", own=images()),
    "ijepa": Tiny(lambda: T.IJepaModel(T.IJepaConfig(**BASE)), "image", own=images()),
    "deit": Tiny(lambda: T.DeiTModel(T.DeiTConfig(**BASE)), "image", own=images()),
    "deit-teacher": Tiny(lambda: T.DeiTForImageClassificationWithTeacher(T.DeiTConfig(**BASE)), "image", own=images()),
    "beit": Tiny(lambda: T.BeitModel(beit(use_relative_position_bias=True)), "image", own=images()),
    "beit-shared": Tiny(
        lambda: T.BeitForMaskedImageModeling(
            beit(
                use_shared_relative_position_bias=True,
                use_mean_pooling=False,
                use_mask_token=True,
                layer_scale_init_value=0.0,
                use_absolute_position_embeddings=True,
            )
        ),
        "image",
        own=images(),
    ),
    "beit-both": Tiny(
        lambda: T.BeitForImageClassification(
            beit(use_relative_position_bias=True, use_shared_relative_position_bias=True)
        ),
        "image",
        own=images(),
    ),
    "data2vec-vision": Tiny(
        lambda: T.Data2VecVisionForImageClassification(T.Data2VecVisionConfig(**BASE, use_relative_position_bias=True)),
        "image",
        own=images(),
    ),
    "dinov2": Tiny(lambda: T.Dinov2Model(T.Dinov2Config(**DINO)), "image", own=images(size=16)),
    "dinov2-gated": Tiny(
        lambda: T.Dinov2ForImageClassification(T.Dinov2Config(**DINO, use_swiglu_ffn=True, qkv_bias=False)),
        "image",
        own=images(size=16),
    ),
    "dinov2_with_registers": Tiny(
        lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)),
        "image",
        own=images(size=16),
    ),
    "clip": Tiny(lambda: T.CLIPModel(clip()), "image", own=images_and_texts),
    "clip-classes": Tiny(lambda: T.CLIPForImageClassification(clip()), "image", own=images()),
    "clip_vision_model": Tiny(lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**BASE)), "image", own=images()),
    "clip_vision_model-projected": Tiny(
        lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**BASE, projection_dim=20)), "image", own=images()
    ),
    "siglip": Tiny(lambda: T.SiglipModel(siglip()), "image", own=images_and_texts, states=SIGLIP_STATES),
    "siglip-classes": Tiny(
        lambda: T.SiglipForImageClassification(siglip()), "image", own=images(), states=SIGLIP_STATES
    ),
    "siglip_vision_model": Tiny(
        lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**BASE)), "image", own=images(), states=SIGLIP_STATES
    ),
    "chinese_clip": Tiny(lambda: T.ChineseCLIPModel(chinese_clip()), "image", own=images_and_texts, attention="eager"),
}
