"""Models, tokenizers and prompts from paths, with errors that say what is wrong in one line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hasten.errors import ConfigError, UnsupportedModel
from hasten.inject.dtypes import COMPUTE, read_dtype

SHIPPED = Path(__file__).parents[1] / "demo" / "model"


def add_model(p: argparse.ArgumentParser, *, positional: bool) -> None:
    """--dtype, --device and the model's path."""
    if positional:
        p.add_argument("model", help="folder of a Hugging Face model, or its name on the hub")
    else:
        p.add_argument(
            "--model_name_or_path",
            "--model-name-or-path",
            "--model",
            dest="model",
            default=str(SHIPPED),
            help="folder of a Hugging Face model, or its name on the hub (default: the small model that ships)",
        )
    p.add_argument("--dtype", help="fp32, fp16, bf16 (default: what the model's files are in)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")


def load_config(path: str) -> Any:
    """The model's config; ConfigError for a path that holds none."""
    import transformers

    folder = Path(path)
    if (path.startswith((".", "/", "~")) or folder.exists()) and not (folder / "config.json").is_file():
        what = "is not a folder" if folder.is_file() else "has no config.json" if folder.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}; a Hugging Face model folder is expected")
    with telling(f"{path}: no usable config"):
        return transformers.AutoConfig.from_pretrained(path)


def load_model(path: str, dtype: str | None, *, auto: str | None = None) -> Any:
    """The model in the class that its config names, or in transformers' `auto` class.

    Raises ConfigError where the files hold less than an `auto` class needs: it would say nothing sensible.
    """
    import transformers

    config = load_config(path)
    named = (getattr(config, "architectures", None) or [None])[0]
    cls = getattr(transformers, auto or named or "AutoModel", None)
    if cls is None:
        raise UnsupportedModel(f"{path}: transformers {transformers.__version__} has no class {named}")
    wanted = torch_dtype(dtype) or "auto"
    quiet()
    with telling(f"{path}: the model does not load"):
        model, found = cls.from_pretrained(path, config=config, dtype=wanted, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if auto and missing:
        raise ConfigError(
            f"{path}: the files lack {len(missing)} tensors of {type(model).__name__}, {missing[0]} first"
        )
    return model.eval()


def load_tokenizer(path: str) -> Any:
    """The model's tokenizer."""
    import transformers

    quiet()
    with telling(f"{path}: no usable tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers 5 makes an empty one where there is no file
        raise ConfigError(f"{path}: no usable tokenizer: it has no vocabulary")
    return tokenizer


def check_output(flag: str, file: Path | None) -> None:
    """ConfigError for a file that could not be written, before any work is done for it."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        why = "is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        raise ConfigError(f"{flag} {file}: {why}")


def quiet() -> None:
    """Keep transformers from filling the screen: what is wrong comes as an error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ConfigError of one line: loaders raise errors of every class."""
    try:
        yield
    except Exception as e:
        lines = str(e).strip().splitlines()
        kind = "" if lines and isinstance(e, OSError | ValueError) else f"{type(e).__name__}: "
        raise ConfigError(f"{what}: {kind}{lines[0] if lines else 'no reason given'}") from e


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a name, ConfigError for an unknown one."""
    if name is None:
        return None
    try:
        dtype = read_dtype(name)
    except ValueError as e:
        raise ConfigError(f"--dtype {name}: expected {e}") from e
    if dtype not in COMPUTE:
        raise ConfigError(
            f"--dtype {name}: quantized weights are not supported by this version; fp32, fp16 or bf16 are"
        )
    return dtype


def read_prompts(path: str) -> list[str]:
    """One prompt a line; empty lines are left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8 text (byte {e.start})") from e
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompt: one a line is expected")
    return prompts
