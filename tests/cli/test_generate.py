"""`hasten generate` says what transformers says, as it comes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

from hasten.cli.__main__ import main

PROMPT = "the old man"
SPEED = r"\d+ tokens in \d+\.\d\d s: \d+\.\d tokens/s\n"


def theirs(folder: Path, prompt: str, new: int) -> str:
    """The prompt and the greedy text that transformers puts behind it."""
    model, tokenizer = T.GPT2LMHeadModel.from_pretrained(folder).eval(), T.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=new, pad_token_id=0)[0]
    return prompt + tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)


def test_one_prompt_and_its_greedy_text_on_stdout_the_speed_on_stderr(command: Any, gpt2: Path) -> None:
    r = command("generate", PROMPT, "--model", gpt2, "--max_new_tokens", 12)
    assert r.status == 0
    assert r.out.rstrip("\n") == theirs(gpt2, PROMPT, 12).rstrip("\ufffd")
    assert re.fullmatch(SPEED, r.err)


def test_text_comes_token_by_token(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.flushed: list[str] = []

        def flush(self) -> None:
            self.flushed.append(self.getvalue())

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["generate", PROMPT, "--model", str(gpt2), "--max_new_tokens", "12"]) == 0
    seen = list(dict.fromkeys(screen.flushed))
    assert seen[0] == PROMPT
    assert len(seen) > 6
    assert all(b.startswith(a) for a, b in zip(seen, seen[1:], strict=False))


def test_several_prompts_each_on_a_line_with_its_number(command: Any, gpt2: Path) -> None:
    prompts = ["the old man", "in the beginning", "it"]
    r = command("generate", *prompts, "--model-name-or-path", gpt2, "--max-new-tokens", 8)
    assert r.status == 0
    for i, prompt in enumerate(prompts):
        assert f"[{i}.0] {theirs(gpt2, prompt, 8)}".rstrip("\ufffd") in r.out
    assert "24 tokens" in r.err or int(r.err.split()[0]) <= 24


def test_prompts_from_a_file_one_a_line(command: Any, gpt2: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the old man\n\n  \nthe sea\r\n", encoding="utf-8")
    r = command("generate", "--model", gpt2, "--sample_input", file, "--max_new_tokens", 5)
    same = command("generate", "the old man", "the sea", "--model", gpt2, "--max_new_tokens", 5)
    assert r.status == 0
    assert r.out == same.out
    assert r.out.startswith("[0.0] the old man")


def test_a_prompt_from_standard_input(command: Any, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
    piped = command("generate", "--model", gpt2, "--max_new_tokens", 5)
    assert piped.status == 0
    assert piped.out == command("generate", PROMPT, "--model", gpt2, "--max_new_tokens", 5).out


def test_seeds_make_sampling_repeatable(command: Any, gpt2: Path) -> None:
    def sample(*more: object) -> str:
        how = ("--temperature", 1.5, "--top_k", 200, "--top-p", 0.99, "--min_p", 0.001, "--max_new_tokens", 12)
        r = command("generate", PROMPT, "--model", gpt2, *how, *more)
        assert r.status == 0
        return r.out

    assert sample("--seed", 5) == sample("--seed", 5)
    assert len({sample("--seed", seed) for seed in range(4)}) > 1
    many = sample("--seed", 5, "--num_samples", 3)
    assert many == sample("--seed", 5, "--num-samples", 3)
    assert [f"[0.{i}] {PROMPT}" in many for i in range(3)] == [True] * 3


def test_text_ends_before_a_stop(command: Any, gpt2: Path) -> None:
    whole = theirs(gpt2, PROMPT, 20)[len(PROMPT) :]
    stop = whole[7:9]
    r = command("generate", PROMPT, "--model", gpt2, "--max_new_tokens", 20, "--stop", "never there", "--stop", stop)
    assert r.status == 0
    assert r.out.rstrip("\n") == PROMPT + whole[: whole.index(stop)].rstrip("\n")


def test_a_repetition_penalty_is_transformers_own(command: Any, gpt2: Path) -> None:
    model, tokenizer = T.GPT2LMHeadModel.from_pretrained(gpt2).eval(), T.AutoTokenizer.from_pretrained(gpt2)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=12, repetition_penalty=1.8, pad_token_id=0)[0]
    r = command("generate", PROMPT, "--model", gpt2, "--max_new_tokens", 12, "--repetition_penalty", 1.8)
    want = PROMPT + tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)
    assert r.out.rstrip("\n") == want.rstrip("\ufffd\n")


@pytest.mark.parametrize(
    "flags", [("--fp16",), ("--dtype", "fp16"), ("--fp16", "--dtype", "half"), ("--dtype", "bf16")]
)
def test_half_precision(command: Any, gpt2: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    import hasten

    seen: list[torch.dtype] = []
    start: Callable[..., Any] = hasten.init_inference

    def record(model: Any, **options: Any) -> Any:
        seen.append(model.dtype)
        return start(model, **options)

    monkeypatch.setattr(hasten, "init_inference", record)
    r = command("generate", PROMPT, "--model", gpt2, "--max_new_tokens", 3, *flags)
    assert r.status == 0
    assert r.out.startswith(PROMPT)
    assert seen == [torch.bfloat16 if "bf16" in flags else torch.float16]


def test_the_model_type_is_checked(command: Any, gpt2: Path) -> None:
    assert command("generate", PROMPT, "--model", gpt2, "--model_type", "GPT2", "--max_new_tokens", 2).status == 0
    r = command("generate", PROMPT, "--model", gpt2, "--model-type", "bloom")
    assert r.status == 2
    assert "--model_type bloom" in r.err
    assert "is of type gpt2" in r.err


def test_decisions_are_explained_on_stderr(command: Any, gpt2: Path) -> None:
    r = command("generate", PROMPT, "--model", gpt2, "--max_new_tokens", 2, "--explain", "--device", "cpu")
    assert "gpt2" in r.err
    assert "3 blocks" in r.err
    assert "blocks" not in r.out


def test_a_prompt_that_memory_cannot_hold_is_bad_news(
    command: Any, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.inject import native

    monkeypatch.setattr(native, "Generator", partial(native.Generator, memory_limit=2**15))  # two pages of 16 tokens
    r = command("generate", PROMPT, f"{PROMPT} looked at the sea and said", "--model", gpt2, "--max_new_tokens", 20)
    assert r.status == 1
    assert f"[0.0] {theirs(gpt2, PROMPT, 20)}".rstrip("\ufffd") in r.out
    assert r.err.startswith("hasten: prompt 1: ")


def test_a_process_of_its_own(gpt2: Path) -> None:
    """As a user starts it, reading a pipe and writing to one."""
    argv = [sys.executable, "-m", "hasten.cli", "generate", "--model", str(gpt2), "--max_new_tokens", "6"]
    r = subprocess.run(argv, input=PROMPT, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    assert r.returncode == 0, r.stderr
    assert r.stdout.rstrip("\n") == theirs(gpt2, PROMPT, 6).rstrip("\ufffd")
    assert re.fullmatch(SPEED, r.stderr)
