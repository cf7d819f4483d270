"""What one transformer block computes, as data: frozen, compared by value, importing nothing but the standard library.

Fields on which architectures disagree have no default, so that a family has to say what it means. Fields that most
architectures do not have at all default to their absence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Order = Literal["pre", "post", "sandwich", "reordered", "parallel", "parallel-shared"]
"""Where norms sit around the two sublayers A (attention) and M (mlp) of a block with input x:

pre              y = x + A(n1 x);          y + M(n2 y)
post             y = n1(x + A x);          n2(y + M y)
sandwich         y = x + n1' A(n1 x);      y + n2' M(n2 y)
reordered        y = x + n1 A x;           y + n2 M y            (OLMo 2)
parallel         x + A(n1 x) + M(n2 x)
parallel-shared  x + A(n1 x) + M(n1 x)
"""


@dataclass(frozen=True, slots=True)
class Norm:
    kind: Literal["layer", "rms"]
    eps: float
    bias: bool = False
    offset: float = 0.0  # the stored weight w means offset + w (Gemma: 1 + w)
    wide: bool = False  # multiply by the weight in float32, before the cast back


@dataclass(frozen=True, slots=True)
class Linear:
    """Position interpolation: every position divided by `factor` (arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Dynamic:
    """NTK-aware base that grows once the sequence is longer than `original` positions."""

    factor: float
    original: int


@dataclass(frozen=True, slots=True)
class Llama3:
    """Low frequencies divided by `factor`, high ones kept, those between blended (Llama 3.1)."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True, slots=True)
class Yarn:
    """Interpolation by wavelength with a ramp between `fast` and `slow` rotations (arXiv 2309.00071)."""

    factor: float
    original: int
    fast: float
    slow: float
    magnitude: float  # multiplies cos and sin
    truncate: bool  # round the ramp's ends to whole dimensions


@dataclass(frozen=True, slots=True)
class LongRope:
    """One divisor per frequency, another set beyond `original` positions (arXiv 2402.13753)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    magnitude: float  # multiplies cos and sin


Scaling = Linear | Dynamic | Llama3 | Yarn | LongRope


@dataclass(frozen=True, slots=True)
class Rope:
    dim: int  # leading dimensions of each head that rotate; the rest pass through
    theta: float
    pairing: Literal["halves", "neighbours"]
    scaling: Scaling | None = None


@dataclass(frozen=True, slots=True)
class Alibi:
    """Scores fall linearly with distance, one slope per head (arXiv 2108.12409)."""

    scaled: bool = False  # the bias is multiplied by the attention scale too (Falcon)
    bf16: bool = False  # the bias is rounded to bfloat16 (Falcon)
    steepest: float = 8.0  # slopes are 2 ** -(steepest * k / heads)
    among: tuple[int, int] | None = (
        None  # where these are some of more heads: the index of the first, and all there are
    )


@dataclass(frozen=True, slots=True)
class Buckets:
    """A learned score per head for each bucket of relative distance, logarithmic when far (T5, arXiv 1910.10683)."""

    count: int
    max_distance: int
    bidirectional: bool


@dataclass(frozen=True, slots=True)
class Attention:
    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # multiplies q k: no default, since some architectures have none
    causal: bool
    bias: str  # which of the letters q, k, v, o carry one
    position: Rope | Alibi | Buckets | None = None
    window: int | None = None  # how many keys a query sees, itself included
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap), before the mask
    qk_norm: Norm | None = None
    qk_norm_span: Literal["head", "heads", "width"] = "head"  # one weight for all heads, one each, or over all of them
    clip: float | None = None  # q, k, v clamped to +-clip
    sinks: bool = False  # a learned logit per head that takes probability and gives no value (GPT-OSS)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly")

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Mlp:
    width: int
    act: str  # a key of hasten.ops.act.ACTS; of GATED where gated
    gated: bool
    bias: bool


@dataclass(frozen=True, slots=True)
class Moe:
    experts: int
    top_k: int
    expert: Mlp
    renormalize: bool  # the chosen scores are divided by their sum
    score: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False
    shared: Mlp | None = None  # an expert that every token takes
    shared_gate: bool = False  # ... weighted by sigmoid(x . gate) (Qwen 2 MoE)
    held: tuple[int, int] | None = None  # where only some of the experts are here: the index of the first, and how many

    @property
    def here(self) -> int:
        """How many of the experts are here."""
        return self.experts if self.held is None else self.held[1]


@dataclass(frozen=True, slots=True)
class Block:
    attention: Attention
    mlp: Mlp | Moe
    norm: Norm
    order: Order
    cross: Attention | None = None  # attention over an encoder's output, after the first sublayer
    residual: float = 1.0  # multiplies each sublayer's output (Granite)
    layer_scale: bool = False  # a learned vector multiplies each sublayer's output (DINOv2)
