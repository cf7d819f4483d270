"""GLM-4: half of each head rotates, neighbour with neighbour; its later version has norms around sublayers."""

from __future__ import annotations

from hasten.families.family import Family, one
from hasten.families.llama import DECODER, SLOTS, attention, bias, mlp, norm, stack
from hasten.spec import Attention, Block, Tower
from hasten.spec.config import Config
from hasten.weights import Dialect, Packed

GLM = Dialect("glm", "layers.{i}.", SLOTS | {"up": Packed("mlp.gate_up_proj")})
GLM4 = Dialect(
    "glm4",
    "layers.{i}.",
    SLOTS
    | {
        "up": Packed("mlp.gate_up_proj"),
        "attn_out_norm": "post_self_attn_layernorm",
        "mlp_out_norm": "post_mlp_layernorm",
    },
)


def glm(c: Config) -> Tower:
    return stack(c, lambda i, kind: Block(_attention(c), mlp(c), norm(c), "pre"))


def glm4(c: Config) -> Tower:
    return stack(c, lambda i, kind: Block(_attention(c), mlp(c), norm(c), "sandwich"))


def _attention(c: Config) -> Attention:
    return attention(c, bias=bias(c, "qkv"), pairing="neighbours")


FAMILIES: dict[str, Family] = {
    "glm": one(glm, GLM, seam=DECODER, classes="GLM-4 9B"),
    "glm4": one(glm4, GLM4, seam=DECODER, classes="GLM-4 0414"),
}
