"""Generate text from prompts, streaming.

The flags of DeepSpeed's text-generation example work too: --model_type, --model_name_or_path, --sample_input, --fp16.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from hasten.cli import ranks
from hasten.cli.load import add_model, load_config, load_model, load_tokenizer, read_prompts, torch_dtype
from hasten.errors import ConfigError


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", nargs="*", help="prompts (default: --sample_input, else standard input)")
    add_model(p, positional=False)
    p.add_argument("--model_type", "--model-type", help="checked against the model's own; never needed")
    p.add_argument("--sample_input", "--sample-input", metavar="FILE", help="prompts, one a line")
    p.add_argument("--fp16", action="store_true", help="the same as --dtype fp16")
    p.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token always")
    p.add_argument("--top_k", "--top-k", type=int, default=0)
    p.add_argument("--top_p", "--top-p", type=float, default=1.0)
    p.add_argument("--min_p", "--min-p", type=float, default=0.0)
    p.add_argument("--repetition_penalty", "--repetition-penalty", type=float, default=1.0)
    p.add_argument("--seed", type=int)
    p.add_argument("--stop", action="append", default=[], help="text ends before this string; may be repeated")
    p.add_argument("--num_samples", "--num-samples", type=int, default=1, help="completions of each prompt")
    ranks.add_ranks(p)
    p.add_argument(
        "--pp_size",
        "--pp-size",
        type=int,
        default=1,
        metavar="P",
        help="cut the layers into P stages",
    )
    p.add_argument("--explain", action="store_true", help="print every decision behind the text")


def run(args: argparse.Namespace) -> int:
    import hasten
    from hasten.runtime import Sampling

    how = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        n=args.num_samples,
    )
    if args.fp16 and torch_dtype(args.dtype) not in (None, torch_dtype("fp16")):
        raise ConfigError(f"--fp16 contradicts --dtype {args.dtype}")
    prompts = _prompts(args)
    _check_stages(args.pp_size, args.num_gpus or ranks.started())
    if ranks.to_start(args):  # they get what came from standard input as arguments
        return ranks.start(args, [] if args.prompt or args.sample_input else ["--", *prompts])
    kind = load_config(args.model).model_type
    if args.model_type and args.model_type.lower() != kind:
        raise ConfigError(f"--model_type {args.model_type}: {args.model} is of type {kind}")
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, "fp16" if args.fp16 else args.dtype, auto="AutoModelForCausalLM")
    across = ranks.started() // args.pp_size
    engine = hasten.init_inference(model, device=args.device, mp_size=across, pp_size=args.pp_size)
    with ranks.first_speaks():
        if args.explain:
            print(engine.explain(), file=sys.stderr)
        well = _speak(engine, tokenizer, prompts, how)
    return 0 if well else 1


def _check_stages(stages: int, processes: int) -> None:
    if stages < 1:
        raise ConfigError(f"--pp_size {stages}: it must be 1 or more")
    if processes > 0 and processes % stages:
        raise ConfigError(f"--pp_size {stages}: it has to divide the number of GPUs, which is {processes} (--num_gpus)")


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt and args.sample_input:
        raise ConfigError("give prompts or --sample_input, not both")
    if args.prompt:
        return args.prompt
    if args.sample_input:
        return read_prompts(args.sample_input)
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as e:
        raise ConfigError(f"standard input is not UTF-8 text (byte {e.start})") from e
    if not text:
        raise ConfigError("no prompt: give one as an argument, with --sample_input FILE, or on standard input")
    return [text]


def _speak(engine: Any, tokenizer: Any, prompts: list[str], how: Any) -> bool:
    """A single completion as it comes, several each when it is done; the speed on standard error.

    False if a prompt was rejected.
    """
    alone, count, start = len(prompts) * how.n == 1, 0, time.perf_counter()
    texts: dict[tuple[int, int], list[str]] = {}
    rejected = False
    if alone:
        print(prompts[0], end="", flush=True)
    with _progress(alone, len(prompts) * how.n * how.max_new_tokens) as bar:
        for event in engine.generate(prompts, how, tokenizer=tokenizer, stream=True):
            count += event.token is not None
            bar.update(event.token is not None)
            texts.setdefault((event.index, event.sample), []).append(event.text or "")
            if alone:
                print(event.text, end="", flush=True)
            elif event.finish_reason:
                bar.write(
                    f"[{event.index}.{event.sample}] {prompts[event.index]}{''.join(texts[event.index, event.sample])}"
                )
            if event.error:
                rejected = True
                bar.write(f"hasten: prompt {event.index}: {event.error}", file=sys.stderr)
    took = time.perf_counter() - start
    print(f"{chr(10) if alone else ''}", end="", flush=True)
    print(f"{count} tokens in {took:.2f} s: {count / took:.1f} tokens/s", file=sys.stderr)
    return not rejected


def _progress(hidden: bool, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="token", disable=hidden or None, leave=False)
