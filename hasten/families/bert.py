"""BERT and what keeps its block: RoBERTa and its kin, ERNIE, Data2Vec; with pre-norm, too."""

from __future__ import annotations

from dataclasses import replace

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
ENCODER = Seam("encoder", keeps=("pooler",), pools="all", pooler=("pooler",))


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
    e = Tokens(
        c.take("vocab_size"),
        c.take("hidden_size"),
        c.take("max_position_embeddings"),
        types=c.take("type_vocab_size"),
        norm=norm(c),
    )
    return Tower(c.take("hidden_size"), e, (block(c),) * c.take("num_hidden_layers"), None)


def ernie(c: Config) -> Tower:
    c.refuse("use_task_id", False, why="a table of task embeddings has no description")
    return bert(c)


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


def prenorm(c: Config) -> Tower:
    """RoBERTa with each norm in front of its sublayer, and one behind the last block."""
    t = roberta(c)
    return replace(t, blocks=tuple(replace(b, order="pre") for b in t.blocks), final_norm=norm(c))


def xlm_roberta_xl(c: Config) -> Tower:
    t = prenorm(c)
    assert isinstance(t.embed, Tokens)
    return replace(t, embed=replace(t.embed, norm=None))


PRENORM = Dialect(
    "roberta-prelayernorm",
    BERT.block,
    {**BERT.slots, "attn_norm": "attention.LayerNorm", "mlp_norm": "intermediate.LayerNorm", "final_norm": "LayerNorm"},
)
XL = Dialect(
    "xlm-roberta-xl",
    BERT.block,
    {
        **BERT.slots,
        "attn_norm": "attention.self_attn_layer_norm",
        "mlp_norm": "LayerNorm",
        "final_norm": "encoder.LayerNorm",
    },
)

FAMILIES: dict[str, Family] = {
    "bert": one(bert, BERT, seam=ENCODER, classes="BERT, MiniLM, BGE, E5"),
    "roberta": one(roberta, BERT, seam=ENCODER, classes="RoBERTa, DistilRoBERTa"),
    "xlm-roberta": one(roberta, BERT, seam=ENCODER, classes="XLM-RoBERTa, multilingual E5"),
    "camembert": one(roberta, BERT, seam=ENCODER, classes="CamemBERT"),
    "roberta-prelayernorm": one(
        prenorm, PRENORM, seam=replace(ENCODER, states="either"), classes="RoBERTa with pre-norm"
    ),
    "xlm-roberta-xl": one(xlm_roberta_xl, XL, seam=ENCODER, classes="XLM-RoBERTa-XL"),
    "data2vec-text": one(roberta, BERT, seam=ENCODER, classes="Data2Vec text"),
    "ernie": one(ernie, BERT, seam=ENCODER, classes="ERNIE without task ids"),
}
