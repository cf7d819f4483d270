"""From the best weights to the folder that ships: Hugging Face files, held-out figures, samples, a model card."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections import defaultdict
from dataclasses import astuple, dataclass
from pathlib import Path
from string import Template

import torch
import transformers
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from training.model import build, depth
from training.plan import Plan

PROMPTS = ("The king", "You land on the planet", "And it came to pass", "The old wizard looked at", "Debian is")
SAMPLE_TOKENS = 90
READ_BY_ALL = {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16", "use_cache": True}
READ_BY_ONE = ("rope_parameters", "dtype", "transformers_version")  # transformers 5 writes these, 4 does not know them
GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
}


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How well unseen documents are predicted, the end of each included."""

    tokens: int = 0
    words: int = 0
    bytes: int = 0
    nats: float = 0.0  # in all

    def __add__(self, other: HeldOut) -> HeldOut:
        return HeldOut(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def bits_per_byte(self) -> float:
        """The measure that does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.bytes

    def figures(self) -> dict[str, float]:
        """Perplexities and bits, by the name they have in the card."""
        return {
            "perplexity_per_token": round(math.exp(self.nats / self.tokens), 2),
            "perplexity_per_word": round(math.exp(self.nats / self.words), 1),
            "bits_per_byte": round(self.bits_per_byte, 3),
            "tokens": self.tokens,
            "words": self.words,
        }


@dataclass(frozen=True, slots=True)
class Training:
    """What the card says of the run; the note is for what no other training has."""

    plan: Plan
    tokens: int
    step: int
    seconds: float
    hardware: str
    note: str


def main() -> None:
    """Export, then measure and sample what was exported, as plain transformers loads it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/build"))
    parser.add_argument("--out", type=Path, default=Path("hasten/demo/model"))
    parser.add_argument("--hardware", default="not recorded", help="what the card says it was trained on")
    parser.add_argument("--note", default="", help="what else the card says of this training")
    arguments = parser.parse_args()
    work, out = arguments.work, arguments.out
    log = json.loads((work / "log.json").read_text())
    plan = Plan(**log["plan"])
    write(load_file(work / "best.safetensors"), plan, work / "tokenizer", out)
    model, tokenizer = load(out)
    heldout = evaluate(model, tokenizer, [json.loads(line) for line in (work / "heldout.jsonl").open()])
    manifest = json.loads((work / "manifest.json").read_text())
    best = min(log["log"], key=lambda entry: entry["validation"])
    figures = {name: best[name] for name in ("tokens", "step", "seconds")}
    training = Training(plan, **figures, hardware=arguments.hardware, note=arguments.note)
    (out / "README.md").write_text(describe(model, training, manifest, heldout, samples(model, tokenizer)))
    shutil.copy(work / "log.json", out / "training.json")
    (out / "data.json").write_text(json.dumps(manifest, indent=1) + "\n")


def write(weights: dict[str, torch.Tensor], plan: Plan, tokenizer: Path, out: Path) -> None:
    """Write weights, configs and tokenizer, in bfloat16 and in names that transformers 4 and 5 both read."""
    model = build(plan, depth(weights))
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    shutil.copy(tokenizer / "tokenizer.json", out)
    config = json.loads((out / "config.json").read_text())
    put(out / "config.json", {key: config[key] for key in config.keys() - READ_BY_ONE} | READ_BY_ALL)
    put(out / "generation_config.json", GENERATION)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings.pop("backend", None)
    put(out / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def put(path: Path, values: dict[str, object]) -> None:
    """Write JSON with its keys in order."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The exported model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: list[dict[str, str]]
) -> dict[str, HeldOut]:
    """By source: each document by itself, after the end-of-text token, in windows of the context without overlap."""
    context, end = model.config.max_position_embeddings, tokenizer.eos_token_id
    sources: dict[str, HeldOut] = defaultdict(HeldOut)
    for document in tqdm(documents, desc="held-out text", unit="document", mininterval=5):
        text, nats = document["text"], 0.0
        ids = torch.tensor([end, *tokenizer(text, verbose=False).input_ids, end])
        for start in range(0, len(ids) - 1, context):
            window = ids[start : start + context + 1]
            logits = model(window[None, :-1]).logits[0]  # (tokens, vocabulary)
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        sources[document["source"]] += HeldOut(len(ids) - 1, len(text.split()), len(text.encode()), nats)
    return dict(sources)


def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One text for each prompt, as the generation config draws it from a fixed seed."""
    texts = []
    for prompt in PROMPTS:
        transformers.set_seed(0)
        tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=SAMPLE_TOKENS)
        texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return texts


def describe(
    model: LlamaForCausalLM,
    training: Training,
    manifest: list[dict[str, object]],
    heldout: dict[str, HeldOut],
    texts: list[str],
) -> str:
    """The model card."""
    template = Template((Path(__file__).parent / "card.md").read_text())
    config: LlamaConfig = model.config
    return template.substitute(
        sum(heldout.values(), HeldOut()).figures(),
        parameters=f"{model.num_parameters() / 1e6:.1f}",
        shape=f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{config.num_key_value_heads} key-value heads, feed-forward {config.intermediate_size}, "
        f"vocabulary {config.vocab_size}, context {config.max_position_embeddings}",
        trained=f"{training.tokens / 1e6:.1f} million",
        steps=training.step,
        minutes=f"{training.seconds / 60:.0f}",
        hardware=training.hardware,
        dropout=f"{training.plan.dropout:g}",
        decay=f"{training.plan.weight_decay:g}",
        growth=_growth(training.plan),
        note=training.note,
        sources="\n".join(_row(source, heldout.get(source["source"])) for source in manifest),
        train_words=f"{sum(source['words']['train'] for source in manifest) / 1e6:.1f} million",
        samples="\n\n".join("> " + re.sub(r"\n+", "\n>\n> ", text) for text in texts),
    )


def _growth(plan: Plan) -> str:
    if plan.layers == plan.grown:
        return ""
    return (
        f"Training began with {plan.layers} layers; after {plan.grow_at:.0%} of the budget copies of them that "
        f"changed nothing at first were put behind each, {plan.grown} in all."
    )


def _row(source: dict[str, object], heldout: HeldOut | None) -> str:
    packages = ", ".join(package["file"].removesuffix(".deb") for package in source["packages"])
    words = source["words"]
    bits = f"{heldout.bits_per_byte:.3f}" if heldout else "-"
    counts = f"{words['train']:,} | {words['heldout']:,} | {bits} | {source['weight']:g}"
    return f"| {source['source']} | {source['licence']} | {counts} | {packages} |"


if __name__ == "__main__":
    main()
