"""BERT and what keeps its block: RoBERTa, XLM-RoBERTa, CamemBERT."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.spec import Attention, Block, Mlp, Norm, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

BERT = Dialect(
    "bert",
    "encoder.layer.{i}.",
    {
        "tokens": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
        "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "out": "attention.output.dense",
        "attn_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    },
)
ENCODER = Seam("encoder", keeps=("pooler",), pooler="pooler")


def block(c: Config) -> Block:
    """BERT's post-norm block."""
    c.refuse("is_decoder", False, why="BERT as a decoder has no description")
    c.refuse("add_cross_attention", False, why="BERT as a decoder has no description")
    c.refuse("position_embedding_type", "absolute", why="relative positions in BERT have no description")
    heads = c.take("num_attention_heads")
    d = c.take("hidden_size") // heads
    a = Attention(heads, heads, d, d**-0.5, causal=False, bias="qkvo")
    return Block(a, Mlp(c.take("intermediate_size"), act(c), gated=False, bias=True), norm(c), "post")


def norm(c: Config) -> Norm:
    return Norm("layer", c.take("layer_norm_eps"), bias=True)


def bert(c: Config) -> Tower:
    c.default("tie_word_embeddings", True)  # the head stays the model's own
    e = Tokens(c.take("vocab_size"), c.take("hidden_size"), c.take("max_position_embeddings"), types=c.take("type_vocab_size"), norm=norm(c))
    return Tower(c.take("hidden_size"), e, (block(c),) * c.take("num_hidden_layers"), None)


def roberta(c: Config) -> Tower:
    """Positions count the tokens that are not padding, from one behind the padding id."""
    c.default("tie_word_embeddings", True)
    pad = c.take("pad_token_id")
    e = Tokens(
        c.take("vocab_size"),
        c.take("hidden_size"),
        c.take("max_position_embeddings"),
        position_offset=pad + 1,
        counted="ids",
        padding=pad,
        types=c.take("type_vocab_size"),
        norm=norm(c),
    )
    return Tower(c.take("hidden_size"), e, (block(c),) * c.take("num_hidden_layers"), None)


FAMILIES: dict[str, Family] = {
    "bert": one(bert, BERT, seam=ENCODER, classes="BERT, MiniLM, BGE, E5"),
    "roberta": one(roberta, BERT, seam=ENCODER, classes="RoBERTa, DistilRoBERTa"),
    "xlm-roberta": one(roberta, BERT, seam=ENCODER, classes="XLM-RoBERTa, multilingual E5"),
    "camembert": one(roberta, BERT, seam=ENCODER, classes="CamemBERT"),
}
