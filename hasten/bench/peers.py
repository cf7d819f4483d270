"""The engines by name, what each needs, and adapters for engines that bring their own models.

The adapters of DeepSpeed, vLLM and gpt-fast follow those projects' public interfaces; none is a dependency of Hasten.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hasten.bench.engines import Compiled, Engine, Live, Native, Stand, Transformers
from hasten.bench.shapes import config, model_class

GENERATION = frozenset({"generate", "decode", "prefill"})
EVERYTHING = GENERATION | {"encode"}


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine that can be asked for. `shares`: it runs on the stand's own model, which must be there for it."""

    title: str
    serves: frozenset[str]  # kinds of work
    make: Callable[[Stand], Engine]
    needs: tuple[str, ...] = ()  # modules
    shares: bool = True

    @property
    def lacks(self) -> list[str]:
        """What of it cannot be imported here."""
        return [name for name in self.needs if find_spec(name) is None]


class DeepSpeed(Transformers):
    """DeepSpeed-Inference with kernel injection, on a copy of the model."""

    pace = 1

    def __init__(self, stand: Stand) -> None:
        deepspeed = import_module("deepspeed")
        model = copy.deepcopy(stand.model)
        self.model = deepspeed.init_inference(
            model,
            dtype=stand.dtype,
            replace_with_kernel_inject=True,
            max_out_tokens=model.config.max_position_embeddings,
        ).module


class Vllm:
    """vLLM's offline engine in this process, with dummy weights of the model's shape."""

    pace = 1

    def __init__(self, stand: Stand) -> None:
        vllm = import_module("vllm")
        told = config(stand.name)
        told.architectures = [model_class(stand.name).__name__]
        folder = tempfile.mkdtemp()
        told.save_pretrained(folder)
        free, total = torch.cuda.mem_get_info(stand.device)
        self.sampling = vllm.SamplingParams
        self.engine = vllm.LLM(
            model=folder,
            dtype=str(stand.dtype).removeprefix("torch."),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=min(told.max_position_embeddings, 16384),
            gpu_memory_utilization=0.85 * free / total,
            enable_prefix_caching=False,
        )

    def prepare(self, sequences: int, tokens: int) -> None:
        pass  # it has done so when it was made

    def generate(self, prompts: list[list[int]], new: Sequence[int]) -> Any:
        how = [self.sampling(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in new]
        return self.engine.generate([{"prompt_token_ids": p} for p in prompts], how, use_tqdm=False)

    def encode(self, inputs: dict[str, Tensor]) -> Any:
        raise NotImplementedError("vLLM is asked for generation only")


class GptFast:
    """gpt-fast, whose folder has to be on the path: a compiled step, one Llama-shaped sequence at a time."""

    pace = 1

    def __init__(self, stand: Stand) -> None:
        model, c = import_module("model"), config(stand.name)
        self.loop: Any = import_module("generate")
        shape = model.ModelArgs(
            block_size=4096,
            vocab_size=c.vocab_size,
            n_layer=c.num_hidden_layers,
            n_head=c.num_attention_heads,
            n_local_heads=c.num_key_value_heads,
            dim=c.hidden_size,
            intermediate_size=c.intermediate_size,
        )
        with torch.device(stand.device):
            self.model = model.Transformer(shape).to(stand.dtype).eval()
            self.model.setup_caches(max_batch_size=1, max_seq_length=shape.block_size)
        self.loop.decode_one_token = torch.compile(self.loop.decode_one_token, mode="reduce-overhead", fullgraph=True)

    def prepare(self, sequences: int, tokens: int) -> None:
        pass

    def generate(self, prompts: list[list[int]], new: Sequence[int]) -> Any:
        if len(prompts) > 1:
            raise NotImplementedError("gpt-fast generates one sequence at a time")
        device = self.model.output.weight.device
        ids = torch.tensor(prompts, device=device, dtype=torch.int)
        token = self.loop.prefill(self.model, ids, torch.arange(ids.shape[1], device=device), temperature=0.0, top_k=1)
        at = torch.tensor([ids.shape[1]], device=device, dtype=torch.int)
        return self.loop.decode_n_tokens(self.model, token.view(1, -1), at, new[0] - 1, temperature=0.0, top_k=1)

    def encode(self, inputs: dict[str, Tensor]) -> Any:
        raise NotImplementedError("gpt-fast is asked for generation only")


PEERS: dict[str, Peer] = {
    "transformers": Peer("transformers", EVERYTHING, Transformers),
    "live": Peer("transformers' generate() on hasten", frozenset({"generate"}), Live, shares=False),
    "compiled": Peer("transformers, compiled", EVERYTHING, Compiled),
    "deepspeed": Peer("DeepSpeed", GENERATION, DeepSpeed, needs=("deepspeed",)),
    "vllm": Peer("vLLM", GENERATION | {"offline"}, Vllm, needs=("vllm",), shares=False),
    "gpt-fast": Peer("gpt-fast", GENERATION, GptFast, needs=("generate", "model", "sentencepiece"), shares=False),
}
HASTEN = Peer("hasten", EVERYTHING | {"offline"}, Native, shares=False)
DEFAULT = ("transformers", "live")
