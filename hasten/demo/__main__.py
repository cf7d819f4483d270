"""The demonstration: text, speed beside plain transformers in the same run, and the certificate."""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

PROMPTS = ("The old man looked at the sea and", "To install the program, you should first", "In the beginning")


def main() -> int:
    """Generate with the shipped model through init_inference; exit status 1 if the two texts differ."""
    p = argparse.ArgumentParser("python -m hasten.demo", description=__doc__)
    p.add_argument("--new", type=int, default=64, help="tokens to generate")
    p.add_argument("--runs", type=int, default=5, help="timed runs of each")
    args = p.parse_args()

    import torch

    import hasten
    from hasten.cli.load import SHIPPED, load_model, load_tokenizer

    tokenizer = load_tokenizer(str(SHIPPED))
    model = load_model(str(SHIPPED), "fp32", auto="AutoModelForCausalLM")
    plain = copy.deepcopy(model)
    start = time.perf_counter()
    engine = hasten.init_inference(model, certify=True)
    ready = time.perf_counter() - start
    plain = plain.to(engine.device)

    for i, g in enumerate(
        engine.generate(
            list(PROMPTS),
            tokenizer=tokenizer,
            temperature=0.8,
            top_p=0.9,
            seed=7,
            repetition_penalty=1.1,
            max_new_tokens=args.new,
        )
    ):
        print(f"{'' if i == 0 else chr(10)}{PROMPTS[i]}{g.text}")

    prompt = tokenizer(PROMPTS[0]).input_ids
    ids = torch.tensor([prompt], device=engine.device)

    def theirs() -> list[int]:
        out = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=args.new,
            min_new_tokens=args.new,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        return out[0, len(prompt) :].tolist()

    def ours() -> list[int]:
        return list(engine.generate([prompt], max_new_tokens=args.new, ignore_eos=True)[0].tokens)

    times = _interleaved((theirs, ours), args.runs)
    speeds = [args.new / t for t in times]
    print(f"\ntransformers {speeds[0]:8.1f} tokens/s")
    print(f"hasten       {speeds[1]:8.1f} tokens/s   {speeds[1] / speeds[0]:.2f}x")
    print(
        f"(greedy, batch 1, {args.new} tokens, medians of {args.runs} interleaved runs; init_inference with its "
        f"certificate took {ready:.2f} s)\n"
    )
    print(engine.certificate)
    same = theirs() == ours()
    print(f"greedy tokens {'equal' if same else 'DIFFER FROM'} those of transformers")
    return 0 if same and engine.certificate is not None and engine.certificate.passed else 1


def _interleaved(calls: tuple[Callable[[], Any], ...], runs: int) -> list[float]:
    """Median seconds of each call, measured in turns."""
    times: list[list[float]] = [[] for _ in calls]
    for run in range(runs + 1):
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if run:  # the first is a warm-up
                kept.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


if __name__ == "__main__":
    sys.exit(main())
