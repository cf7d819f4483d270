"""Checkpoints as Megatron-LM writes them, made row by row from the weights of tiny models."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Model = dict[str, Any]
"""Tables by name, norms and linears as (weight, bias), `layers` a list of such; q, k and v apart, heads in order."""


def pair(m: Any) -> Pair:
    return m.weight.detach().clone(), m.bias.detach().clone()


def of_gpt2(m: Any) -> Model:
    layers = []
    for b in m.transformer.h:
        w, bias = pair(b.attn.c_attn)
        h = w.shape[0]
        each = {
            n: (w[:, i * h : (i + 1) * h].T.clone(), bias[i * h : (i + 1) * h].clone()) for i, n in enumerate("qkv")
        }
        turned = {n: (c.weight.detach().T.clone(), c.bias.detach()) for n, c in
                  (("o", b.attn.c_proj), ("up", b.mlp.c_fc), ("down", b.mlp.c_proj))}  # fmt: skip
        layers.append({**each, **turned, "ln1": pair(b.ln_1), "ln2": pair(b.ln_2)})
    t = m.transformer
    return {"word": t.wte.weight.detach(), "pos": t.wpe.weight.detach(), "final": pair(t.ln_f), "layers": layers}


def of_bert(m: Any) -> Model:
    """transformers' MegatronBertForPreTraining."""
    e, layers = m.bert.embeddings, []
    for b in m.bert.encoder.layer:
        a = b.attention
        layers.append({
            "q": pair(a.self.query), "k": pair(a.self.key), "v": pair(a.self.value), "o": pair(a.output.dense),
            "ln1": pair(a.ln), "ln2": pair(b.ln), "up": pair(b.intermediate.dense), "down": pair(b.output.dense),
        })  # fmt: skip
    head = m.cls.predictions
    return {
        "word": e.word_embeddings.weight.detach(), "pos": e.position_embeddings.weight.detach(),
        "types": e.token_type_embeddings.weight.detach(), "final": pair(m.bert.encoder.ln), "layers": layers,
        "pooler": pair(m.bert.pooler.dense), "mlm": pair(head.transform.dense),
        "mlm_norm": pair(head.transform.LayerNorm),
        "mlm_bias": head.bias.detach(), "pairs": pair(m.cls.seq_relationship),
    }  # fmt: skip


def of_live(m: Any, version: int, heads: int) -> Model:
    """A live Megatron module of tests.tiny.megatron, whose fused rows are in the order of the version."""
    inner = m.language_model
    stack = getattr(inner, "encoder", None) or inner.transformer
    layers = []
    for b in stack.layers:
        a = getattr(b, "self_attention", None) or b.attention
        each = {n: ([], []) for n in "qkv"}
        for tensor in (0, 1):
            t = pair(a.query_key_value)[tensor]
            hn = len(t) // heads // 3
            for row in range(len(t)):
                if version == 0:
                    n, at = row // (heads * hn), row % (heads * hn)
                elif version == 1:
                    n, at = row % 3, row // 3
                else:
                    n, at = row // hn % 3, row // (3 * hn) * hn + row % hn
                each["qkv"[n]][tensor].append((at, t[row]))
        qkv = {
            n: tuple(torch.stack([r for _, r in sorted(p, key=lambda x: x[0])]) for p in both)
            for n, both in each.items()
        }
        layers.append({**qkv, "o": pair(a.dense), "ln1": pair(b.input_layernorm),
                       "ln2": pair(b.post_attention_layernorm), "up": pair(b.mlp.dense_h_to_4h),
                       "down": pair(b.mlp.dense_4h_to_h)})  # fmt: skip
    e = inner.embedding
    model: Model = {"word": e.word_embeddings.weight.detach(), "pos": e.position_embeddings.weight.detach(),
                    "final": pair(stack.final_layernorm), "layers": layers}  # fmt: skip
    if e.tokentype_embeddings is not None:
        model |= {"types": e.tokentype_embeddings.weight.detach(), "pooler": pair(inner.pooler.dense)}
        model |= {"pairs": pair(m.binary_head)}
    return model


def fused(layer: Model, heads: list[int], hn: int, version: int) -> Pair:
    """query_key_value of some heads, as formats of the version order its rows."""
    both = []
    for tensor in (0, 1):
        q, k, v = (layer[n][tensor] for n in "qkv")
        rows: list[Tensor] = []
        if version == 0:
            rows = [x[h * hn + c] for x in (q, k, v) for h in heads for c in range(hn)]
        elif version == 1:
            rows = [x[h * hn + c] for h in heads for c in range(hn) for x in (q, k, v)]
        else:
            rows = [x[h * hn + c] for h in heads for x in (q, k, v) for c in range(hn)]
        both.append(torch.stack(rows))
    return both[0], both[1]


LEGACY = {"qkv": "query_key_value", "o": "dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
          "ln1": "input_layernorm", "ln2": "post_attention_layernorm"}  # fmt: skip
CORE = {"qkv": "linear_qkv", "o": "linear_proj", "up": "mlp.linear_fc1", "down": "mlp.linear_fc2",
        "ln1": "input_layernorm", "ln2": "pre_mlp_layernorm"}  # fmt: skip
TRANSFORMER_ENGINE = CORE | {"ln1": "self_attention.linear_qkv.layer_norm_", "ln2": "mlp.linear_fc1.layer_norm_"}


def share(t: Tensor, axis: int, rank: int, ranks: int) -> Tensor:
    return t.tensor_split(ranks, axis)[rank].clone()


def layer_of(
    layer: Model, rank: int, ranks: int, heads: int, version: int, names: dict[str, str], attention: str
) -> Model:
    """One rank's share of one layer, by names below `layers.N.`."""
    hn, own = len(layer["q"][1]) // heads, heads // ranks
    cut = {
        "qkv": fused(layer, list(range(rank * own, (rank + 1) * own)), hn, version),
        "o": (share(layer["o"][0], 1, rank, ranks), layer["o"][1]),
        "up": tuple(share(t, 0, rank, ranks) for t in layer["up"]),
        "down": (share(layer["down"][0], 1, rank, ranks), layer["down"][1]),
        "ln1": layer["ln1"],
        "ln2": layer["ln2"],
    }
    out: Model = {}
    for slot, (w, b) in cut.items():
        name = f"{attention}.{names[slot]}" if slot in ("qkv", "o") else names[slot]
        dot = "" if name.endswith("_") else "."
        out[f"{name}{dot}weight"], out[f"{name}{dot}bias"] = w.clone(), b.clone()
    return out


def padded(t: Tensor, rows: int) -> Tensor:
    return torch.cat([t, t.new_full((rows - len(t), *t.shape[1:]), 7.0)])


def write(
    folder: Path,
    model: Model,
    *,
    heads: int,
    ranks: int = 1,
    stages: int = 1,
    chunks: int = 1,
    version: int = 2,
    era: str = "encoder",
    divisible: int = 8,
    arguments: dict[str, Any] | None = None,
    says_version: bool = True,
    iteration: int = 30,
) -> Path:
    """Files of every rank below `folder`, which has the tracker, too.

    era: "transformer" (oldest names), "encoder", "core" or "te" (Megatron-Core, norms fused). chunks: pieces of a
    virtual pipeline. divisible: what the vocabulary is padded to, times ranks; the padding is no zeros.
    """
    core = era in ("core", "te")
    names = {"core": CORE, "te": TRANSFORMER_ENGINE}.get(era, LEGACY)
    attention = "attention" if era == "transformer" else "self_attention"
    unit = divisible * ranks
    rows = -(-len(model["word"]) // unit) * unit
    layers, per = model["layers"], len(model["layers"]) // (stages * chunks)
    inside = folder / f"iter_{iteration:07d}"
    for rank in range(ranks):
        for stage in range(stages):
            pieces = []
            for chunk in range(chunks):
                start = (chunk * stages + stage) * per
                stack: Model = {}
                for n in range(per):
                    made = layer_of(layers[start + n], rank, ranks, heads, version, names, attention)
                    stack |= {f"layers.{n}.{k}": t for k, t in made.items()}
                first, last = start == 0, start + per == len(layers)
                if last:
                    stack |= dict(zip(("final_layernorm.weight", "final_layernorm.bias"), model["final"], strict=True))
                pieces.append((_core if core else _legacy)(model, stack, first, last, rank, ranks, rows, era))
            content: Model = {"iteration": iteration, "optimizer": {"step": 3}, "rng_state": [{"x": 1}]}
            content |= {"checkpoint_version": float(version)} if says_version else {}
            content |= {"args": Namespace(**arguments)} if arguments is not None else {}
            content |= {"model": pieces[0]} if chunks == 1 else {f"model{i}": p for i, p in enumerate(pieces)}
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
            (inside / name).mkdir(parents=True, exist_ok=True)
            torch.save(content, inside / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return inside


def _tables(model: Model, rank: int, ranks: int, rows: int) -> dict[str, Tensor]:
    tables = {
        "word_embeddings": share(padded(model["word"], rows), 0, rank, ranks),
        "position_embeddings": model["pos"],
    }
    return tables | ({"tokentype_embeddings": model["types"]} if "types" in model else {})


def _legacy(model: Model, stack: Model, first: bool, last: bool, rank: int, ranks: int, rows: int, era: str) -> Model:
    inner: Model = {era: stack}
    if first:
        inner["embedding"] = {n: {"weight": t.clone()} for n, t in _tables(model, rank, ranks, rows).items()}
    out: Model = {"language_model": inner}
    if last:
        if "pooler" in model:
            inner["pooler"] = {"dense.weight": model["pooler"][0], "dense.bias": model["pooler"][1]}
            out["binary_head"] = dict(zip(("weight", "bias"), model["pairs"], strict=True))
        if "mlm" in model:
            head = {"bias": share(padded(model["mlm_bias"], rows), 0, rank, ranks)}
            for n, slot in (("dense", "mlm"), ("layernorm", "mlm_norm")):
                head |= {f"{n}.weight": model[slot][0], f"{n}.bias": model[slot][1]}
            out["lm_head"] = head
        if not first:
            out["word_embeddings_for_head"] = {"weight": share(padded(model["word"], rows), 0, rank, ranks)}
    return out


def _core(model: Model, stack: Model, first: bool, last: bool, rank: int, ranks: int, rows: int, era: str) -> Model:
    kind = "encoder" if "types" in model else "decoder"
    out: Model = {f"{kind}.{n}": t for n, t in stack.items()}
    out |= {f"{kind}.layers.0.self_attention.linear_qkv._extra_state": None}
    if first:
        out |= {f"embedding.{n}.weight": t.clone() for n, t in _tables(model, rank, ranks, rows).items()}
    if last:
        if "pooler" in model:
            out |= {"pooler.dense.weight": model["pooler"][0], "pooler.dense.bias": model["pooler"][1]}
            out |= {"binary_head.weight": model["pairs"][0], "binary_head.bias": model["pairs"][1]}
        if "mlm" in model:
            for n, slot in (("dense", "mlm"), ("layer_norm", "mlm_norm")):
                out |= {f"lm_head.{n}.weight": model[slot][0], f"lm_head.{n}.bias": model[slot][1]}
            out["output_layer.bias"] = share(padded(model["mlm_bias"], rows), 0, rank, ranks)
        if not first:
            out["output_layer.weight"] = share(padded(model["word"], rows), 0, rank, ranks)
    return out


def arguments(model: Model, heads: int, ranks: int = 1, stages: int = 1, **more: Any) -> dict[str, Any]:
    """What Megatron's args say of it."""
    layer = model["layers"][0]
    return {
        "num_layers": len(model["layers"]), "hidden_size": model["word"].shape[1], "num_attention_heads": heads,
        "ffn_hidden_size": len(layer["up"][1]), "kv_channels": len(layer["q"][1]) // heads,
        "tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages, "swiglu": False,
        "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "params_dtype": torch.float32,
        "make_vocab_size_divisible_by": 8, "padded_vocab_size": 999,
        "untie_embeddings_and_output_weights": False, **more,
    }  # fmt: skip
