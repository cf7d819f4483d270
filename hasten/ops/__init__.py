"""Every op that a transformer is made of, each with its reference and its faster implementations."""

from hasten.ops.act import ACTS, GATED, act, gated
from hasten.ops.advance import advance
from hasten.ops.attention import alibi_slopes, attend, bucket
from hasten.ops.embed import EmbedLayer, embed, embed_over
from hasten.ops.linear import Matrix, linear
from hasten.ops.moe import experts, held, route
from hasten.ops.norm import NormLayer, norm, norms_over
from hasten.ops.packed import attend_packed
from hasten.ops.pages import Reach, Slots, attend_pages, write_pages
from hasten.ops.region import head, heads, project, project_normed, qkv, up
from hasten.ops.rope import rope, rope_rates, rope_table
from hasten.ops.sample import Choice, sample
from hasten.ops.settle import settle, settle_over
from hasten.ops.table import TABLE, Op, invariant, is_invariant, use
from hasten.ops.workspace import Workspace

__all__ = [
    "ACTS",
    "GATED",
    "TABLE",
    "Choice",
    "EmbedLayer",
    "Matrix",
    "NormLayer",
    "Op",
    "Reach",
    "Slots",
    "Workspace",
    "act",
    "advance",
    "alibi_slopes",
    "attend",
    "attend_packed",
    "attend_pages",
    "bucket",
    "embed",
    "embed_over",
    "experts",
    "gated",
    "head",
    "heads",
    "held",
    "invariant",
    "is_invariant",
    "linear",
    "norm",
    "norms_over",
    "project",
    "project_normed",
    "qkv",
    "rope",
    "rope_rates",
    "rope_table",
    "route",
    "sample",
    "settle",
    "settle_over",
    "up",
    "use",
    "write_pages",
]

from hasten.ops import cpu as cpu  # noqa: E402, I001 -- registers, once every op exists
