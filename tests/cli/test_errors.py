"""Whatever is wrong with what a user gives: one line on stderr that says so, exit status 2, no traceback."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Make = Callable[[Path, Path], list[object]]


def copied(gpt2: Path, place: Path) -> Path:
    return Path(shutil.copytree(gpt2, place / "copy"))


def with_config(text: str | bytes) -> Make:
    def make(gpt2: Path, place: Path) -> list[object]:
        folder = copied(gpt2, place)
        (folder / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
        return ["generate", "hello", "--model", folder]

    return make


def with_field(name: str, value: object) -> Make:
    def make(gpt2: Path, place: Path) -> list[object]:
        folder = copied(gpt2, place)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | {name: value}), encoding="utf-8")
        return ["generate", "hello", "--model", folder]

    return make


def with_file(name: str, content: bytes | None, *argv: object) -> Make:
    """A model one file of which has other content, or is gone."""

    def make(gpt2: Path, place: Path) -> list[object]:
        folder = copied(gpt2, place)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        return [*(argv or ("generate", "hello")), "--model", folder]

    return make


def without_tokenizer(gpt2: Path, place: Path) -> list[object]:
    folder = copied(gpt2, place)
    for file in folder.glob("*token*"):
        file.unlink()
    return ["generate", "hello", "--model", folder]


def prompts(content: bytes) -> Make:
    def make(gpt2: Path, place: Path) -> list[object]:
        (place / "prompts.txt").write_bytes(content)
        return ["generate", "--model", gpt2, "--sample_input", place / "prompts.txt"]

    return make


def on(*argv: object) -> Make:
    """`generate hello` with more arguments, on a good model."""
    return lambda gpt2, place: ["generate", "hello", "--model", gpt2, *argv]


def plain(*argv: object) -> Make:
    return lambda gpt2, place: list(argv)


CASES: dict[str, tuple[Make, str]] = {
    "unknown path": (plain("generate", "hello", "--model", "/no/such/folder"), "/no/such/folder does not exist"),
    "unknown relative path": (plain("certify", "./nowhere"), "./nowhere does not exist"),
    "a name that cannot be fetched": (plain("certify", "nobody/nothing"), "nobody/nothing: no usable config"),
    "a file instead of a folder": (
        lambda gpt2, place: ["certify", gpt2 / "config.json"],
        "config.json is not a folder; a Hugging Face model folder is expected",
    ),
    "a folder without a model": (lambda gpt2, place: ["certify", place], "has no config.json"),
    "a config that is no JSON": (with_config("{not json"), "no usable config"),
    "an empty config": (with_config(""), "no usable config"),
    "a config that is a list": (with_config("[1, 2]"), "no usable config"),
    "a config that is no text": (with_config(b"\xff\xfe\x00{}"), "no usable config"),
    "a config of no known type": (with_config('{"model_type": "nonsense"}'), "no usable config"),
    "a field of the wrong type": (with_field("n_embd", "many"), "copy"),
    "a field that contradicts the weights": (with_field("n_embd", 48), "does not load"),
    "no weights": (with_file("model.safetensors", None), "the model does not load"),
    "weights cut short": (with_file("model.safetensors", b"\x10\x00\x00"), "the model does not load"),
    "weights of nothing": (with_file("model.safetensors", b"\x02" + bytes(7) + b"{}"), "lack"),
    "no tokenizer": (without_tokenizer, "no usable tokenizer"),
    "a broken tokenizer": (with_file("tokenizer.json", b"{]"), "no usable tokenizer"),
    "unknown dtype": (on("--dtype", "fp12"), "--dtype fp12: expected a torch dtype or its name"),
    "quantized dtype": (on("--dtype", "int8"), "--dtype int8: quantized weights are not supported by this version"),
    "two dtypes": (on("--fp16", "--dtype", "bf16"), "--fp16 contradicts --dtype bf16"),
    "unknown device": (on("--device", "abacus"), "abacus"),
    "a length that is no number": (on("--max_new_tokens", "many"), "--max_new_tokens"),
    "a negative length": (on("--max_new_tokens", -3), "max_new_tokens=-3 is not an integer of at least 1"),
    "a negative temperature": (on("--temperature", -0.5), "temperature=-0.5"),
    "a temperature that is no number": (on("--temperature", "nan"), "temperature=nan"),
    "top_p above one": (on("--top_p", 1.5), "top_p=1.5"),
    "a negative seed": (on("--seed", -1), "seed=-1"),
    "no samples": (on("--num_samples", 0), "n=0"),
    "an empty stop": (on("--stop", ""), "at least one character"),
    "several things at once": (on("--top_p", 7, "--top_k", -1), "top_k=-1 is not an integer of at least 0; top_p=7.0"),
    "longer than the model's positions": (on("--max_new_tokens", 500), "64"),
    "an empty prompt": (lambda gpt2, place: ["generate", "", "--model", gpt2], "makes no tokens of ''"),
    "prompts twice": (on("--sample_input", "x.txt"), "give prompts or --sample_input, not both"),
    "no file of prompts": (
        lambda gpt2, place: ["generate", "--model", gpt2, "--sample_input", place / "no"],
        "No such file",
    ),
    "a folder of prompts": (
        lambda gpt2, place: ["generate", "--model", gpt2, "--sample_input", place],
        "Is a directory",
    ),
    "an empty file of prompts": (prompts(b" \n\n"), "holds no prompt"),
    "prompts that are no UTF-8": (prompts(b"fine\n\xc3("), r"is not UTF-8 text (byte 5)"),
    "unknown flag": (on("--nonsense"), "--nonsense"),
    "unknown command": (plain("transmogrify"), "transmogrify"),
    "no command": (plain(), "COMMAND"),
    "a certificate nowhere": (plain("certify", ".", "--json", "/no/where.json"), "--json /no/where.json: there is no"),
    "a certificate with a negative seed": (plain("certify", ".", "--seed", -1), "--seed must be from 0"),
    "no shape": (plain("bench", "gpt9:fp32"), "no shape gpt9; there are gpt2"),
    "a shape in no dtype": (plain("bench", "gpt2:fp12"), "--dtype fp12"),
    "no runs": (plain("bench", "gpt2", "--runs", 0), "--runs must be at least 1, got 0"),
    "no threads": (plain("bench", "gpt2", "--threads", -2), "--threads must be at least 1, got -2"),
    "a benchmark on no device": (plain("bench", "gpt2", "--device", "abacus"), "--device abacus"),
    "a benchmark to nowhere": (plain("bench", "gpt2", "--json", "/no/where.json"), "there is no folder /no"),
    "a benchmark to a folder": (lambda gpt2, place: ["bench", "gpt2", "--plot", place], "is a folder"),
}


def one_line(status: int, out: str, err: str, says: str) -> None:
    assert status == 2
    assert says in err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert len(err) < 600
    assert out in ("", "hello")  # a prompt may stand there already


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_in_one_line(case: str, command: Any, gpt2: Path, tmp_path: Path) -> None:
    make, says = CASES[case]
    r = command(*make(gpt2, tmp_path))
    one_line(r.status, r.out, r.err, says)


def test_an_encoder_generates_nothing(command: Any, gpt2: Path, bert: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(bert, tmp_path / "both"))
    for file in gpt2.glob("*token*"):
        shutil.copy(file, both)
    r = command("generate", "hello", "--model", both)
    one_line(r.status, r.out, r.err, "tensors of BertLMHeadModel")


def test_a_file_that_may_not_be_read(command: Any, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **how: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    r = command("generate", "--model", gpt2, "--sample_input", "secret.txt")
    one_line(r.status, r.out, r.err, "hasten: secret.txt: Permission denied")


@pytest.mark.parametrize(("given", "says"), [(b" \n", "no prompt"), (b"caf\xe9", "standard input is not UTF-8")])
def test_standard_input_without_a_prompt(
    given: bytes, says: str, command: Any, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    r = command("generate", "--model", gpt2)
    one_line(r.status, r.out, r.err, says)


def test_interruption_is_no_traceback(command: Any, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hasten.cli.generate.load_tokenizer", interrupt)
    r = command("generate", "hello", "--model", gpt2)
    assert (r.status, r.err) == (130, "hasten: interrupted\n")


def test_a_process_of_its_own_ends_with_two(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "hasten.cli", "certify", str(tmp_path / "nothing")]
    r = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    one_line(r.returncode, r.stdout, r.stderr, "nothing does not exist")


def test_a_reader_that_has_enough_is_no_error() -> None:
    """As in `hasten models | head -1`, only that the reader is gone for sure."""
    shell = f"{sys.executable} -m hasten.cli models | true; exit ${{PIPESTATUS[0]}}"
    r = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=300, check=False)
    assert r.stderr == ""
    assert r.returncode == 0
