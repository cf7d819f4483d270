"""OPT: learned positions that count real tokens from 2; its 350M variant norms behind and embeds narrowly."""

from __future__ import annotations

from hasten.families.family import Family, Seam, one
from hasten.families.fields import act
from hasten.spec import Attention, Block, Head, Mlp, Norm, Projection, Tokens, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect

OPT = Dialect(
    "opt",
    "layers.{i}.",
    {
        "tokens": "embed_tokens",
        "positions": "embed_positions",
        "project_in": "project_in",
        "project_out": "project_out",
        "final_norm": "final_layer_norm",
        "head": "/lm_head",
        "attn_norm": "self_attn_layer_norm",
        "mlp_norm": "final_layer_norm",
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
)
SKIPPED = 2  # rows of the position table in front of position 0


def opt(c: Config) -> Tower:
    c.refuse("layer_norm_elementwise_affine", True, why="norms without weights have no description")
    width, narrow, heads = c.take("hidden_size"), c.take("word_embed_proj_dim"), c.take("num_attention_heads")
    bias, pre = bool(c.take("enable_bias")), bool(c.take("do_layer_norm_before"))
    n, d = Norm("layer", 1e-5, bias=True), width // heads
    a = Attention(heads, heads, d, d**-0.5, causal=True, bias="qkvo" if bias else "")
    b = Block(
        a, Mlp(c.take("ffn_dim"), act(c, "activation_function"), gated=False, bias=bias), n, "pre" if pre else "post"
    )
    embed = Tokens(
        vocab=c.take("vocab_size"),
        width=narrow,
        positions=c.take("max_position_embeddings") + SKIPPED,
        position_offset=SKIPPED,
        counted="mask",
        projection=None if narrow == width else Projection(bias=False, after="tokens", back=True),
    )
    final = n if pre and not c.default("_remove_final_layer_norm", False) else None
    head = Head(tied=bool(c.default("tie_word_embeddings", True)))
    return Tower(width, embed, (b,) * c.take("num_hidden_layers"), final, head)


FAMILIES: dict[str, Family] = {"opt": one(opt, OPT, seam=Seam("decoder", ("decoder",)), classes="OPT, Galactica")}
