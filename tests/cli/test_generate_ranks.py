"""`hasten generate --num_gpus` and scripts on several ranks: one voice, the same words, and one end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as T

from tests.inject.test_deepspeed_scripts import GPT2, GPT_NEO, saved
from tests.inject.vocabulary import words
from tests.tiny.decoders import ENDS, GPT
from tests.tiny.model import Tiny, build

ROOT = Path(__file__).parents[2]
EVEN: dict[str, Any] = {**GPT, "n_embd": 32, "n_head": 4}
NEO: dict[str, Any] = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 64, **ENDS}
ON = ("cpu", pytest.param("gpu", marks=pytest.mark.multigpu))
STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build(Tiny(lambda: T.GPT2LMHeadModel(T.GPT2Config(**EVEN)), "decoder"))
    return saved(tmp_path_factory.mktemp("gpt2"), model, words(side="left"))


@pytest.fixture(scope="module")
def neo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = [[["global", "local"], 1], [["local"], 1]]
    config = T.GPTNeoConfig(attention_types=kinds, window_size=4, **NEO)
    model = build(Tiny(lambda: T.GPTNeoForCausalLM(config), "decoder"))
    return saved(tmp_path_factory.mktemp("neo"), model, words())


def hasten(*arguments: object, stdin: str = "", on: str = "cpu") -> subprocess.CompletedProcess[str]:
    free = {n: v for n, v in os.environ.items() if n not in STARTED} | {"PYTHONPATH": str(ROOT)}
    free |= {"CUDA_VISIBLE_DEVICES": ""} if on == "cpu" else {}
    words_ = [sys.executable, "-m", "hasten", *map(str, arguments)]
    return subprocess.run(words_, input=stdin, capture_output=True, text=True, timeout=120, env=free, check=False)


def test_two_ranks_say_what_one_says_once(gpt2: Path) -> None:
    how = ("--model", gpt2, "--device", "cpu", "--max_new_tokens", 12)
    one, two = (hasten("generate", *how, *more, stdin="the old man") for more in ((), ("--num_gpus", 2)))
    assert two.returncode == one.returncode == 0, two.stderr
    assert two.stdout == one.stdout
    assert two.stderr.count("tokens/s") == 1


def test_two_stages_say_what_one_process_says(gpt2: Path) -> None:
    how = ("--model", gpt2, "--device", "cpu", "--max_new_tokens", 12, "--explain")
    one, two = (hasten("generate", "the old man", *how, *more) for more in ((), ("--num_gpus", 2, "--pp_size", 2)))
    assert two.returncode == one.returncode == 0, two.stderr
    assert two.stdout == one.stdout
    assert two.stderr.count("blocks 0-1 on this rank") == 1


def test_samples_of_two_ranks_and_the_decisions_behind_them(gpt2: Path) -> None:
    how = ("--temperature", 0.8, "--num_samples", 3, "--model", gpt2, "--device", "cpu", "--max_new_tokens", 6)
    r = hasten("generate", "the old man", "in", *how, "--num-gpus", 2, "--explain")
    assert r.returncode == 0, r.stderr
    assert sorted(line[:5] for line in r.stdout.splitlines()) == [f"[{i}.{n}]" for i in (0, 1) for n in (0, 1, 2)]
    assert r.stderr.count("on rank 0 of 2") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--num_gpus", 3), "cannot be divided among 3 ranks (it can among 1, 2, 4)"),
        (("--num_gpus", 0), "--num_gpus 0: it must be 1 or more"),
        (("--num_gpus", 3, "--pp_size", 2), "--pp_size 2: it has to divide the number of GPUs, which is 3"),
        (("--num_gpus", 2, "--device", "cpu:0"), "each rank has a GPU of its own"),
    ],
)
def test_what_cannot_be(gpt2: Path, more: tuple[object, ...], said: str) -> None:
    r = hasten("generate", "it", "--model", gpt2, *(() if "--device" in more else ("--device", "cpu")), *more)
    assert r.returncode == 2
    assert said in r.stderr
    assert r.stdout == ""


def ported(script: str, folder: Path, before: str, after: str) -> str:
    script = script.replace("import deepspeed.", "import hasten.").replace("from deepspeed", "from hasten")
    script = script.replace("import deepspeed\n", "import hasten as deepspeed\n")
    return f"folder = {str(folder)!r}\n{before}\n{script}\n{after}\n"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("on", ON)
def test_the_gpt2_script_of_the_tutorial_under_the_launcher(gpt2: Path, tmp_path: Path, ranks: int, on: str) -> None:
    """Text of the divided model is what transformers says on one."""
    body = GPT2.replace("mp_size=1", f"mp_size={ranks}").replace("padding=True)", "padding=True).to(model.device)")
    file = tmp_path / "script.py"
    file.write_text(ported(body, gpt2, "import torch; dtype = torch.float", "print(result.tolist())"))
    r = hasten("run", "--num_gpus", ranks, file, on=on)
    assert r.returncode == 0, r.stderr
    model: Any = T.GPT2LMHeadModel.from_pretrained(gpt2).eval()
    tokenizer = T.AutoTokenizer.from_pretrained(gpt2)
    inputs = tokenizer(["the old man looked at the sea", "in the beginning"], return_tensors="pt", padding=True)
    want = model.generate(**inputs, do_sample=False, max_length=25, min_length=25, pad_token_id=0).tolist()
    assert r.stdout.strip() == repr(want)


@pytest.mark.parametrize("on", ON)
def test_the_gpt_neo_pipeline_of_the_tutorial_on_two_ranks(neo: Path, tmp_path: Path, on: str) -> None:
    said = []
    body = GPT_NEO if on == "cpu" else GPT_NEO.replace('device="cpu"', "device=local_rank")
    for ranks, fused in ((1, False), (2, True)):
        file = tmp_path / f"{ranks}.py"
        file.write_text(ported(body, neo, f"fused = {fused}", ""))
        r = hasten("run", "--num_gpus", ranks, file, on=on)
        assert r.returncode == 0, r.stderr
        said.append(r.stdout)
    assert "DeepSpeed is" in said[0]
    assert said[1] == said[0]


@pytest.mark.parametrize("size", ["mp_size", "pp_size"])
def test_a_rank_that_is_killed_while_it_generates_ends_all_and_is_named(gpt2: Path, tmp_path: Path, size: str) -> None:
    file = tmp_path / "script.py"
    file.write_text(
        "import os, signal, transformers, hasten\n"
        f"model = transformers.GPT2LMHeadModel.from_pretrained({str(gpt2)!r})\n"
        f"engine = hasten.init_inference(model, {size}=2, device='cpu')\n"
        "for i, event in enumerate(engine.generate([[5, 6, 7]], max_new_tokens=50, ignore_eos=True, stream=True)):\n"
        "    if i == 20 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    r = hasten("run", "--num_gpus", 2, file)
    assert r.returncode == 128 + 9
    assert "rank 1 of 2 was killed by SIGKILL" in r.stderr
