"""Whisper: an encoder of spectrograms and a decoder of text, keys without bias."""

from __future__ import annotations

from collections.abc import Mapping

from hasten.families.bart import DIALECT
from hasten.families.family import Family, Seam
from hasten.families.fields import act
from hasten.spec import Attention, Block, Frames, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

WHISPER = Dialect("whisper", DIALECT.block, {**DIALECT.slots, "conv1": "conv1", "conv2": "conv2"})


def whisper(c: Config) -> Mapping[str, Tower]:
    for name in ("tie_word_embeddings", "scale_embedding", "is_decoder", "add_cross_attention"):
        c.default(name, None)  # the head stays the model's own; Whisper never scales its embedding
    n, width = Norm("layer", 1e-5, bias=True), c.take("d_model")

    def block(side: str) -> Block:
        heads = c.take(f"{side}_attention_heads")
        d, decodes = width // heads, side == "decoder"
        own, other = (Attention(heads, heads, d, d**-0.5, causal=k, bias="qvo") for k in (decodes, False))
        mlp = Mlp(c.take(f"{side}_ffn_dim"), act(c, "activation_function"), gated=False, bias=True)
        return Block(own, mlp, n, "pre", cross=other if decodes else None)

    frames = Frames(c.take("num_mel_bins"), c.take("max_source_positions"))
    tokens = Tokens(c.take("vocab_size"), width, c.take("max_target_positions"))
    return {
        "encoder": Tower(width, frames, (block("encoder"),) * c.take("encoder_layers"), n),
        "decoder": Tower(width, tokens, (block("decoder"),) * c.take("decoder_layers"), n),
    }


FAMILIES: dict[str, Family] = {
    "whisper": Family(
        whisper,
        {"encoder": (WHISPER,), "decoder": (WHISPER,)},
        {"encoder": Seam("audio", ("encoder",)), "decoder": Seam("seq2seq-decoder", ("decoder",))},
        "Whisper, Distil-Whisper",
    )
}
