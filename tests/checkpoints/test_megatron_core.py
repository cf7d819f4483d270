"""Megatron-Core's modern layers: grouped queries, gated mlps, RMS norms, rotary positions, experts."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from tests.checkpoints.saved import assert_same, empty, tensors
from tests.checkpoints.test_megatron_refusals import refused
from tests.tiny import TINY, build


def qkv(a: Any, groups: list[int], heads: int, kv_heads: int) -> Tensor:
    """Rows of some groups: the group's queries, its key, its value."""
    d, each = a.q_proj.weight.shape[0] // heads, heads // kv_heads
    rows = []
    for g in groups:
        rows += [a.q_proj.weight[(g * each + q) * d + c] for q in range(each) for c in range(d)]
        rows += [m.weight[g * d + c] for m in (a.k_proj, a.v_proj) for c in range(d)]
    return torch.stack(rows).detach()


def part(t: Tensor, axis: int, rank: int, ranks: int) -> Tensor:
    return t.detach().tensor_split(ranks, axis)[rank].clone()


def layer(b: Any, rank: int, ranks: int, config: Any, experts: list[int]) -> dict[str, Tensor]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    own = kv_heads // ranks
    a = b.self_attn
    out = {
        "self_attention.linear_qkv.layer_norm_weight": b.input_layernorm.weight.detach(),
        "self_attention.linear_qkv.weight": qkv(a, list(range(rank * own, (rank + 1) * own)), heads, kv_heads),
        "self_attention.linear_proj.weight": part(a.o_proj.weight, 1, rank, ranks),
    }
    if hasattr(a, "q_norm"):
        out |= {f"self_attention.{n}_layernorm.weight": getattr(a, f"{n}_norm").weight.detach() for n in "qk"}
    norm = b.post_attention_layernorm.weight.detach()
    if not hasattr(b.mlp, "experts"):
        gate, up = (part(m.weight, 0, rank, ranks) for m in (b.mlp.gate_proj, b.mlp.up_proj))
        out |= {"mlp.linear_fc1.layer_norm_weight": norm, "mlp.linear_fc1.weight": torch.cat([gate, up])}
        return out | {"mlp.linear_fc2.weight": part(b.mlp.down_proj.weight, 1, rank, ranks)}
    out |= {"pre_mlp_layernorm.weight": norm, "mlp.router.weight": b.mlp.gate.weight.detach()}
    for n, e in enumerate(experts):
        gate, up = b.mlp.experts.gate_up_proj[e].chunk(2)
        name = f"mlp.experts.local_experts.{n}"
        out[f"{name}.linear_fc1.weight"] = torch.cat([part(gate, 0, rank, ranks), part(up, 0, rank, ranks)])
        out[f"{name}.linear_fc2.weight"] = part(b.mlp.experts.down_proj[e], 1, rank, ranks)
    return out


def write(folder: Path, model: Any, ranks: int, stages: int = 1, owners: int = 1, **more: Any) -> None:
    """owners: expert-parallel ranks."""
    c, layers = model.config, model.model.layers
    per = len(layers) // stages
    said: dict[str, Any] = {
        "num_layers": len(layers), "hidden_size": c.hidden_size, "num_attention_heads": c.num_attention_heads,
        "num_query_groups": c.num_key_value_heads, "group_query_attention": True, "swiglu": True,
        "normalization": "RMSNorm", "position_embedding_type": "rope", "rotary_percent": 1.0,
        "rotary_base": c.rope_parameters["rope_theta"], "norm_epsilon": c.rms_norm_eps,
        "tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages,
        "expert_model_parallel_size": owners, "untie_embeddings_and_output_weights": True, **more,
    }  # fmt: skip
    count = getattr(c, "num_local_experts", 0) // owners
    for rank in range(ranks):
        for stage in range(stages):
            for owner in range(owners):
                state: dict[str, Any] = {"decoder.final_layernorm._extra_state": None}
                for n in range(per):
                    experts = list(range(owner * count, (owner + 1) * count))
                    made = layer(layers[stage * per + n], rank, ranks, c, experts)
                    state |= {f"decoder.layers.{n}.{k}": t for k, t in made.items()}
                if stage == 0:
                    state["embedding.word_embeddings.weight"] = part(model.model.embed_tokens.weight, 0, rank, ranks)
                if stage == stages - 1:
                    state["decoder.final_layernorm.weight"] = model.model.norm.weight.detach()
                    state["output_layer.weight"] = part(model.lm_head.weight, 0, rank, ranks)
                name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
                name += f"_{owner:03d}" if owners > 1 else ""
                (folder / name).mkdir(parents=True)
                content = {"model": state, "args": Namespace(**said), "checkpoint_version": 3.0, "iteration": 1}
                torch.save(content, folder / name / "model_optim_rng.pt")


@pytest.mark.parametrize(
    ("ranks", "stages", "owners"), [(1, 1, 1), (2, 1, 1), (1, 3, 1), (2, 3, 1), (2, 1, 5), (2, 3, 5)]
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_modern_layers_give_the_model(name: str, ranks: int, stages: int, owners: int, tmp_path: Path) -> None:
    if name not in TINY:
        pytest.skip("this release of transformers does not have it")
    model: Any = build(TINY[name])
    c = model.config
    experts = getattr(c, "num_local_experts", 0)
    if experts and not hasattr(model.model.layers[0], "mlp"):
        pytest.skip("transformers 4 keeps experts apart")
    if not experts and owners > 1:
        pytest.skip("a model without experts")
    if c.num_key_value_heads % ranks or len(model.model.layers) % stages or experts % owners:
        pytest.skip("its sizes do not divide")
    write(tmp_path, model, ranks, stages, owners)
    target = empty(model)
    engine = hasten.init_inference(target, checkpoint=tmp_path)
    assert_same(engine.module.state_dict(), model.state_dict())
    assert tensors(target).keys() == tensors(model).keys()


def test_rotary_settings_that_differ_are_refused(tmp_path: Path) -> None:
    model: Any = build(TINY["llama"])
    write(tmp_path, model, 1, rotary_base=77, rotary_percent=0.5)
    refused(tmp_path, "rotary_base 77", "rotary dimensions", model=model)
