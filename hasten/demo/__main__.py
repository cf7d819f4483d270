"""The demonstration: text, speed beside plain transformers in the same run, and the certificate."""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from typing import Any

PROMPTS = ("The old man looked at the sea and", "To install the program, you should first", "In the beginning")


def main() -> int:
    """Generate with the shipped model through init_inference; exit status 1 if the two texts differ."""
    p = argparse.ArgumentParser("python -m hasten.demo", description=__doc__)
    p.add_argument("--new", type=int, default=64, help="tokens to generate")
    p.add_argument("--runs", type=int, default=5, help="timed runs of each")
    p.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    args = p.parse_args()

    import hasten
    from hasten.cli.load import SHIPPED, load_model, load_tokenizer

    tokenizer = load_tokenizer(str(SHIPPED))
    model = load_model(str(SHIPPED), "fp32", auto="AutoModelForCausalLM")
    plain = copy.deepcopy(model)
    start = time.perf_counter()
    engine = hasten.init_inference(model, device=args.device, certify=True)
    ready = time.perf_counter() - start

    _speak(engine, tokenizer, args.new)
    same = _compare(plain.to(engine.device), engine, tokenizer(PROMPTS[0]).input_ids, args.new, args.runs)
    print(f"init_inference with its certificate took {ready:.2f} s\n\n{engine.certificate}")
    print(f"greedy tokens {'equal' if same else 'DIFFER FROM'} those of transformers")
    return 0 if same and engine.certificate is not None and engine.certificate.passed else 1


def _speak(engine: Any, tokenizer: Any, new: int) -> None:
    """Sampled text behind every prompt."""
    how = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.1, "max_new_tokens": new}
    for prompt, g in zip(PROMPTS, engine.generate(list(PROMPTS), tokenizer=tokenizer, **how), strict=True):
        print(f"{prompt}{g.text}\n")


def _compare(plain: Any, engine: Any, prompt: list[int], new: int, runs: int) -> bool:
    """Print the speed of both on the same greedy tokens, and say whether they are the same."""
    import torch

    from hasten.bench.timing import interleave, job

    ids = torch.tensor([prompt], device=engine.device)
    how = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    how |= {"attention_mask": torch.ones_like(ids), "temperature": None, "top_p": None, "top_k": None}

    def theirs() -> list[int]:
        return plain.generate(ids, **how)[0, len(prompt) :].tolist()

    def ours() -> list[int]:
        return list(engine.generate([prompt], max_new_tokens=new, ignore_eos=True)[0].tokens)

    times, failures = interleave({"transformers": job(theirs), "hasten": job(ours)}, runs)
    for failure in failures.values():
        raise failure
    a, b = (new / statistics.median(t for (t,) in times[name]) for name in ("transformers", "hasten"))
    where = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "the processor"
    print(f"transformers {a:8.1f} tokens/s\nhasten       {b:8.1f} tokens/s   {b / a:.2f}x")
    print(f"(on {where}, float32, greedy, batch 1, {new} tokens, medians of {runs} runs in turns)")
    return theirs() == ours()


if __name__ == "__main__":
    sys.exit(main())
