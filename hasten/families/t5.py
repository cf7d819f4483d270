"""T5 and mT5: no positions but a bias per bucket of distance, held by the first block of each side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hasten.families.family import Family, Seam
from hasten.families.fields import ACT
from hasten.spec import Attention, Block, Buckets, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect


def _slots(feed: int, gated: bool) -> dict[str, Any]:
    """Sublayer 0 attends, 1 of a decoder looks at the encoder, the last (`feed`) is the mlp."""
    dense = f"layer.{feed}.DenseReluDense"
    return {
        "tokens": "embed_tokens",
        "final_norm": "final_layer_norm",
        "buckets": "block.0.layer.0.SelfAttention.relative_attention_bias",
        "attn_norm": "layer.0.layer_norm",
        "qkv": tuple(f"layer.0.SelfAttention.{x}" for x in "qkv"),
        "out": "layer.0.SelfAttention.o",
        "cross_norm": "layer.1.layer_norm",
        "cross_q": "layer.1.EncDecAttention.q",
        "cross_kv": tuple(f"layer.1.EncDecAttention.{x}" for x in "kv"),
        "cross_out": "layer.1.EncDecAttention.o",
        "mlp_norm": f"layer.{feed}.layer_norm",
        "up": (f"{dense}.wi_0", f"{dense}.wi_1") if gated else f"{dense}.wi",
        "down": f"{dense}.wo",
    }


def _dialects(side: str, feed: int) -> tuple[Dialect, ...]:
    return tuple(
        Dialect(f"t5/{side}/{name}", "block.{i}.", _slots(feed, gated))
        for name, gated in (("plain", False), ("gated", True))
    )


def t5(c: Config) -> Mapping[str, Tower]:
    for name in ("tie_word_embeddings", "scale_decoder_outputs", "is_decoder", "add_cross_attention"):
        c.default(name, None)  # the head stays the model's own; its two sides say what the rest says
    width, heads, d = c.take("d_model"), c.take("num_heads"), c.take("d_kv")
    n = Norm("rms", c.take("layer_norm_epsilon"))
    mlp = Mlp(c.take("d_ff"), c.choose("dense_act_fn", ACT), gated=bool(c.take("is_gated_act")), bias=False)
    count, most = c.take("relative_attention_num_buckets"), c.take("relative_attention_max_distance")

    def attention(causal: bool, position: Buckets | None) -> Attention:
        return Attention(heads, heads, d, 1.0, causal=causal, bias="", position=position)

    encoder = Block(attention(False, Buckets(count, most, bidirectional=True)), mlp, n, "pre")
    own, other = attention(True, Buckets(count, most, bidirectional=False)), attention(False, None)
    decoder = Block(own, mlp, n, "pre", cross=other)
    embed, layers = Tokens(c.take("vocab_size"), width), c.take("num_layers")
    return {
        "encoder": Tower(width, embed, (encoder,) * layers, n),
        "decoder": Tower(width, embed, (decoder,) * c.default("num_decoder_layers", layers), n),
    }


SEAMS = {"encoder": Seam("seq2seq-encoder", ("encoder",)), "decoder": Seam("seq2seq-decoder", ("decoder",))}
DIALECTS = {"encoder": _dialects("encoder", 1), "decoder": _dialects("decoder", 2)}

FAMILIES: dict[str, Family] = {
    "t5": Family(t5, DIALECTS, SEAMS, "T5, T5 1.1, FLAN-T5"),
    "mt5": Family(t5, DIALECTS, SEAMS, "mT5"),
}
