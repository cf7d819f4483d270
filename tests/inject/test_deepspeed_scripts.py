"""Scripts in the manner of DeepSpeed-Inference's tutorials run with only their imports changed.

The calls are those of https://www.deepspeed.ai/tutorials/inference-tutorial and of its text-generation examples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import hasten
from tests.inject.vocabulary import SIZE, bert, words
from tests.tiny.decoders import GPT
from tests.tiny.decoders import gpt_neo as neo
from tests.tiny.encoders import BASE
from tests.tiny.model import Tiny, build
from tests.tiny.seq2seq import T5

GPT2 = """
import torch
import deepspeed
import deepspeed.module_inject as module_inject
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

tokenizer = AutoTokenizer.from_pretrained(folder)
model = GPT2LMHeadModel.from_pretrained(folder)
model.eval()
engine = deepspeed.init_inference(
    model,
    mp_size=1,
    dtype=dtype,
    injection_policy={GPT2Block: module_inject.replace_policy.HFGPT2LayerPolicy},
    replace_with_kernel_inject=True,
)
model = engine.module
inputs = tokenizer(["the old man looked at the sea", "in the beginning"], return_tensors="pt", padding=True)
result = model.generate(
    input_ids=inputs["input_ids"],
    attention_mask=inputs["attention_mask"],
    do_sample=False,
    max_length=25,
    min_length=25,
    pad_token_id=0,
)
"""

GPT_NEO = """
import os
import torch
import deepspeed
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

local_rank = int(os.getenv("LOCAL_RANK", "0"))
world_size = int(os.getenv("WORLD_SIZE", "1"))
generator = pipeline(
    "text-generation",
    model=AutoModelForCausalLM.from_pretrained(folder),
    tokenizer=AutoTokenizer.from_pretrained(folder),
    device="cpu",
)
if fused:
    generator.model = deepspeed.init_inference(
        generator.model, mp_size=world_size, dtype=torch.float, replace_with_kernel_inject=True
    )
torch.manual_seed(3)
result = generator("DeepSpeed is", do_sample=True, min_length=50, max_length=54, max_new_tokens=None)
if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
    print(result)
engine = generator.model
"""

BERT = """
import torch
import deepspeed
from deepspeed.module_inject.replace_policy import HFBertLayerPolicy
from transformers import AutoTokenizer, BertForMaskedLM, pipeline
from transformers.models.bert.modeling_bert import BertLayer

pipe = pipeline(
    "fill-mask",
    model=BertForMaskedLM.from_pretrained(folder),
    tokenizer=AutoTokenizer.from_pretrained(folder),
    device="cpu",
)
if fused:
    pipe.model = deepspeed.init_inference(
        pipe.model,
        dtype=torch.float,
        mp_size=1,
        injection_policy={BertLayer: HFBertLayerPolicy},
        replace_method="auto",
        replace_with_kernel_inject=True,
    )
result = [(r["token_str"], r["score"]) for r in pipe("the old man looked at the [MASK]", top_k=9)]
engine = pipe.model
"""

T5_NAMES = """
import torch
import deepspeed
from transformers import AutoTokenizer, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Block

tokenizer = AutoTokenizer.from_pretrained(folder)
model = T5ForConditionalGeneration.from_pretrained(folder)
engine = model
if fused:
    engine = deepspeed.init_inference(
        model,
        mp_size=1,
        dtype=torch.float,
        injection_policy={T5Block: ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")},
    )
inputs = tokenizer(["the old man looked at the sea", "in the beginning"], return_tensors="pt", padding=True)
result = engine.generate(**inputs, do_sample=False, max_new_tokens=12, min_new_tokens=12).tolist()
"""


def saved(folder: Path, model: T.PreTrainedModel, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(script: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """The names that a script leaves behind, run with each `deepspeed` that it imports changed to Hasten."""
    ported = script.replace("import deepspeed.", "import hasten.").replace("from deepspeed", "from hasten")
    ported = ported.replace("import deepspeed\n", "import hasten as deepspeed\n")
    names: dict[str, Any] = {"folder": str(folder), **settings}
    exec(compile(ported, "<script>", "exec"), names)
    return names


def served(engine: hasten.InferenceEngine, count: int) -> None:
    assert len(engine.backbones) == count
    natively = engine.generating is not None and engine.generating.served > 0
    assert all((b.calls > 0 or natively) and not b.detours for b in engine.backbones)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    model = build(Tiny(lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT)), "decoder"))
    return saved(tmp_path / "gpt2", model, words(side="left"))


@pytest.mark.parametrize("dtype", [torch.float, torch.half], ids=str)
def test_the_gpt2_generation_script(gpt2: Path, dtype: torch.dtype) -> None:
    names = run(GPT2, gpt2, dtype=dtype)
    served(names["engine"], 1)
    assert names["model"].dtype == dtype
    ids, inputs = names["result"], names["inputs"]
    plain = T.GPT2LMHeadModel.from_pretrained(gpt2).eval()
    how = {"do_sample": False, "max_length": 25, "min_length": 25, "pad_token_id": 0}
    if dtype == torch.float:
        assert torch.equal(ids, plain.generate(**inputs, **how))
    width = inputs.input_ids.shape[1]
    mask = torch.cat([inputs.attention_mask, torch.ones_like(ids[:, width:])], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = plain(ids, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1]
    logits[..., 2] = -torch.inf  # the end may not come before min_length
    chosen = logits.gather(-1, ids[:, width:, None])[..., 0]
    assert ids.shape == (2, 25)
    assert (logits.max(-1).values - chosen).max() < (1e-4 if dtype == torch.float else 0.05)


@pytest.mark.parametrize(
    ("script", "make", "tokenizer", "backbones"),
    [
        pytest.param(GPT_NEO, neo(), words, 1, id="GPT-Neo, sampled"),
        pytest.param(BERT, lambda: T.BertForMaskedLM(T.BertConfig(**BASE)), bert, 1, id="BERT, policy class"),
        pytest.param(
            T5_NAMES,
            lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
            lambda: words(frame="$A [SEP]", pair="$A [SEP] $B [SEP]"),
            2,
            id="T5, names of linears",
        ),
    ],
)
def test_a_script_gives_what_it_gives_without(
    tmp_path: Path, script: str, make: Any, tokenizer: Any, backbones: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model", build(Tiny(make, "decoder")), tokenizer())
    want = run(script, folder, fused=False)["result"]
    names = run(script, folder, fused=True)
    served(names["engine"], backbones)
    got = names["result"]
    if script is BERT:
        assert [t for t, _ in got] == [t for t, _ in want]
        assert [s for _, s in got] == pytest.approx([s for _, s in want], abs=1e-5)
    else:
        assert got == want
    if script is GPT_NEO:
        text = got[0]["generated_text"]
        assert text.startswith("DeepSpeed is")
        assert len(text.split()) >= 50
        assert capsys.readouterr().out.count(repr(got)) == 2


@pytest.mark.parametrize("form", ["dict", "JSON file", "JSON file as str", "dict and keywords"])
def test_a_config_is_a_dict_or_a_file_or_beside_keywords(tmp_path: Path, form: str) -> None:
    config = {
        "dtype": "torch.bfloat16",
        "replace_with_kernel_inject": True,
        "tensor_parallel": {"tp_size": 1},
        "max_out_tokens": 40,
        "enable_cuda_graph": False,
    }
    before = json.dumps(config)
    file = tmp_path / "inference.json"
    file.write_text(before, encoding="utf-8")
    given = {
        "dict": (config, {}),
        "JSON file": (file, {}),
        "JSON file as str": (str(file), {}),
        "dict and keywords": (config, {"dtype": torch.bfloat16, "min_out_tokens": 2}),
    }[form]
    model = build(Tiny(neo(), "decoder"))
    engine = hasten.init_inference(model, given[0], **given[1])
    assert engine.dtype == torch.bfloat16
    assert engine.options.max_out_tokens == 40
    assert json.dumps(config) == before
    ids = torch.randint(3, SIZE, (2, 6))
    assert engine.generate(ids, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, do_sample=False).shape == (2, 11)
    served(engine, 1)


def test_policies_are_attributes_of_the_package() -> None:
    import hasten as deepspeed

    policy = deepspeed.module_inject.replace_policy.HFGPT2LayerPolicy
    assert policy is deepspeed.module_inject.HFGPT2LayerPolicy
    assert isinstance(hasten.init_inference(build(Tiny(neo(), "decoder"))), deepspeed.InferenceEngine)
