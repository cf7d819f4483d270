"""One rank of a real DeepSpeed run on the CPU: trains a tiny model, saves a checkpoint and what it holds then.

Arguments: the folder, ZeRO's stage, the dtype (fp32 or bf16), and more settings of `zero_optimization` as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed  # pyright: ignore[reportMissingImports]
import torch
from transformers import GPT2Config, GPT2LMHeadModel


def make() -> GPT2LMHeadModel:
    """Tied weights, odd sizes, and two frozen parameters."""
    config = GPT2Config(vocab_size=61, n_positions=19, n_embd=20, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    torch.manual_seed(3)
    model = GPT2LMHeadModel(config)
    for n, p in model.named_parameters():
        p.data.add_(0.1 * torch.randn_like(p))
        p.requires_grad_(n not in ("transformer.h.0.ln_1.weight", "transformer.h.1.mlp.c_fc.weight"))
    return model


def main(folder: str, stage: int, dtype: str, more: dict[str, Any]) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage, **more},
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
    }
    deepspeed.ops.__compatible_ops__.clear()  # nothing is compiled
    deepspeed.init_distributed(dist_backend="gloo")
    model = make()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=config
    )
    for step in range(3):
        ids = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(step)).to(engine.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(folder)
    masters: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    known = stage and not more.get("round_robin_gradients")  # DeepSpeed's own accessor mixes parameters up there
    for n, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            weights[n] = p.detach().clone().cpu()
        if known and p.requires_grad:
            masters[n] = deepspeed.utils.safe_get_full_fp32_param(p).clone().cpu()
    if torch.distributed.get_rank() == 0:
        torch.save({"masters": masters, "weights": weights}, Path(folder) / "trained.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
