"""The training run: a budget of minutes or tokens, a schedule tied to it, checkpoints from which it goes on exactly.

Whenever the loss on the validation split is the lowest so far, the weights are written too, in bfloat16: they are what
is exported.

Started by torchrun, the processes share every batch and average their gradients. They wait for each other a few times
a step, where the threads of one process wait in every operation, which a busy machine makes slow.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from tqdm import tqdm
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from training.corpus import Corpus
from training.model import build, depth, grow
from training.muon import Muon
from training.plan import Plan, Progress, rate

BAR = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"


def main() -> None:
    """Train, or go on training; best.safetensors, checkpoint.pt, log.json and loss.png stay in the work folder."""
    parser = options()
    chosen = vars(parser.parse_args())
    work, device, compiled = (chosen.pop(name) for name in ("work", "device", "compile"))
    torch.set_num_threads(chosen.pop("threads"))
    torch.set_float32_matmul_precision("high")
    plan = Plan(**chosen)
    if math.isinf(min(plan.minutes, plan.tokens)):
        parser.error("give --minutes or --tokens")
    if plan.grown % plan.layers:
        parser.error(f"--grown {plan.grown} is not a multiple of --layers {plan.layers}")
    if "RANK" in os.environ:  # torchrun's
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    run = Run(plan, work, device, compiled=compiled)
    run.go()
    if run.rank == 0:
        plot(run.progress.log, work / "loss.png")
    if distributed.is_initialized():
        distributed.destroy_process_group()


def options() -> argparse.ArgumentParser:
    """Every field of the plan, and where and how it runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/build"))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--tokens", type=float, default=math.inf)
    parser.add_argument("--length", type=int, default=512, help="tokens per row, and the model's context")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6, help="at the start")
    parser.add_argument("--grown", type=int, default=6, help="layers at the end, a multiple of those at the start")
    parser.add_argument("--grow-at", type=float, default=0.42, help="fraction of the budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--vector-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.0, help="for many passes over the data")
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps")
    parser.add_argument("--validation-rows", type=int, default=40, help="that an evaluation reads, at most")
    parser.add_argument("--save-every", type=float, default=4, help="minutes")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


class Run:
    """A model on its way through a plan."""

    def __init__(self, plan: Plan, work: Path, device: str, *, compiled: bool) -> None:
        self.plan, self.work, self.compiled = plan, work, compiled
        self.train = Corpus.load(work / "train.npz")
        alone = not distributed.is_initialized()
        self.rank, self.processes = (0, 1) if alone else (distributed.get_rank(), distributed.get_world_size())
        rows = Corpus.load(work / "validation.npz").rows(plan.length)
        spread = rows[:: math.ceil(len(rows) / plan.validation_rows)]
        self.validation = spread[: len(spread) // self.processes * self.processes]
        self.progress = Progress()
        self.checkpoint = work / "checkpoint.pt"
        self.use(build(plan, plan.layers).to(device))
        if self.checkpoint.exists():
            self.restore()

    def use(self, model: LlamaForCausalLM) -> None:
        """Train this model from here on, with fresh optimizers."""
        self.model = model
        self.optimizers = optimizers(model, self.plan)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        if self.compiled:
            model.compile(dynamic=False)

    def go(self) -> None:
        """Spend what is left of the budget."""
        plan, progress = self.plan, self.progress
        device = self.model.device
        batches = self.train.batches(plan.length, plan.batch, seed=plan.seed, skip=progress.step, device=device)
        if progress.fraction(plan) < 1:
            self.prepare()
        started, saved = time.monotonic() - progress.seconds, progress.seconds
        done = 100 * progress.fraction(plan)
        with tqdm(total=100, initial=done, bar_format=BAR, mininterval=5, disable=self.rank > 0) as bar:
            while (fraction := progress.fraction(plan)) < 1:
                if fraction >= plan.grow_at and len(self.model.model.layers) < plan.grown:
                    self.use(grow(self.model, plan))
                loss = self.step(next(batches), rate(fraction))  # a tensor: to look at it is to wait for the device
                progress.step += 1
                progress.tokens += plan.batch * plan.length
                progress.seconds = self.agree(time.monotonic() - started)
                last = progress.fraction(plan) >= 1
                if last or progress.step % plan.evaluate_every == 0:
                    self.note(loss)
                if last or progress.seconds - saved >= plan.save_every * 60:
                    self.save()
                    saved = progress.seconds
                bar.update(min(100, 100 * progress.fraction(plan)) - bar.n)
                speed = f"{progress.tokens / progress.seconds:.0f} tokens/s"
                bar.set_postfix(step=progress.step, speed=speed, **progress.last(), refresh=False)

    def prepare(self) -> None:
        """Do once, off the clock, what is slow the first time: a compiled model is compiled when it is called."""
        if self.compiled:
            tokens = torch.zeros(self.plan.batch // self.processes, self.plan.length, dtype=torch.long)
            self.loss(tokens).backward()
            self.model.zero_grad(set_to_none=True)

    def step(self, tokens: Tensor, part: float) -> Tensor:
        """One update at `part` of the peak learning rates; its loss before the update, in nats per token."""
        torch.manual_seed((self.plan.seed + self.progress.step) * self.processes + self.rank)  # for dropout
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = part * peak
        loss = self.loss(tokens[self.rank :: self.processes])
        loss.backward()
        if self.processes > 1:
            self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def loss(self, tokens: Tensor, forward: Callable[..., CausalLMOutputWithPast] | None = None) -> Tensor:
        """The mean loss of predicting each token of the rows from those before it."""
        tokens = tokens.to(self.model.device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type != "cpu"):
            return (forward or self.model)(tokens, labels=tokens).loss

    def average_gradients(self) -> None:
        """Replace every gradient by its mean over the processes."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.processes
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def average(self, value: Tensor) -> float:
        """The mean of a number over the processes."""
        if self.processes > 1:
            distributed.all_reduce(value)
        return value.item() / self.processes

    def agree(self, seconds: float) -> float:
        """The first process's clock."""
        if self.processes == 1:
            return seconds
        clock = torch.tensor(seconds, dtype=torch.float64, device=self.model.device)
        distributed.broadcast(clock, 0)
        return clock.item()

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss on the validation rows, in nats per token, by the model as it is without compilation."""
        self.model.eval()
        own = self.validation[self.rank :: self.processes]
        parts = [self.loss(rows, self.model.forward) * len(rows) for rows in own.split(self.plan.batch)]
        self.model.train()
        return self.average(torch.stack(parts).sum() / len(own))

    def note(self, loss: Tensor) -> None:
        """Append the losses to the log, and write it; write the weights too if none were better."""
        progress, validation = self.progress, self.validate()
        best = all(validation < entry["validation"] for entry in progress.log)
        entry = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 1)}
        progress.log.append(entry | {"loss": round(loss.item(), 4), "validation": round(validation, 4)})
        if self.rank > 0:
            return
        log = {"plan": asdict(self.plan), "log": progress.log}
        (self.work / "log.json").write_text(json.dumps(log, indent=1) + "\n")
        if best:
            weights = self.model.state_dict()
            del weights["lm_head.weight"]  # the embedding's
            weights = {name: tensor.bfloat16().contiguous() for name, tensor in weights.items()}
            save_file(weights, partial := self.work / "best.partial", {"format": "pt"})
            partial.replace(self.work / "best.safetensors")

    def save(self) -> None:
        """Write the checkpoint; a run that is killed meanwhile leaves the one before."""
        if self.rank > 0:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }
        torch.save(state, partial := self.checkpoint.with_suffix(".partial"))
        partial.replace(self.checkpoint)

    def restore(self) -> None:
        """Go back to where the checkpoint was written."""
        state = torch.load(self.checkpoint, map_location=self.model.device, weights_only=True)
        self.use(build(self.plan, depth(state["model"])).to(self.model.device))
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])


def optimizers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    fused = model.device.type == "cuda"
    adamw = torch.optim.AdamW(others, lr=plan.vector_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    return [Muon(matrices, lr=plan.matrix_rate, weight_decay=plan.weight_decay), adamw]


def plot(log: list[dict[str, float]], path: Path) -> None:
    """Draw both losses over the tokens seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("loss", "validation"):
        axes.plot([entry["tokens"] for entry in log], [entry[name] for entry in log], label=name)
    axes.set(xlabel="tokens", ylabel="nats per token")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
