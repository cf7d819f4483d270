"""Every key that `init_inference` knows: DeepSpeed-Inference's, past and present, and Hasten's own, in one table.

A key that DeepSpeed has keeps its name, its aliases and its default there; what it does here is its disposition:

    works     does what `says` tells
    needless  is accepted; `says` tells why nothing needs to be done, and the engine's explain() repeats it
    arrives   is accepted at the values in `permits`; anything else is an error that repeats `says`

`permits` restricts the values of any key; None stands for "not given" everywhere and is always permitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hasten.inject.dtypes import COMPUTE
from hasten.inject.kinds import (
    ANYTHING,
    CERTIFY,
    CHECKPOINT,
    COUNT,
    COUNTS,
    DEVICE,
    DTYPE,
    FLAG,
    GROUP,
    INTEGER,
    MAPPING,
    MPU,
    NAME,
    PATH,
    POLICY,
    SECTION,
    TEXT,
    TP_GROUP,
    Kind,
    choice,
)


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `name` is its dotted path; `moved` is the path of the key that replaced a deprecated one."""

    name: str
    kind: Kind
    default: Any
    disposition: Literal["works", "needless", "arrives"]
    says: str
    aliases: tuple[str, ...] = ()
    permits: tuple[Any, ...] | None = None
    instead: str = ""  # what to do about a value that is not permitted, where `says` does not tell
    moved: str | None = None
    shorthand: str | None = None  # a section may be written as the bare value of this key of its own

    @property
    def section(self) -> str:
        """The path of the section that holds the key; empty at the top."""
        return self.name.rpartition(".")[0]

    @property
    def spellings(self) -> tuple[str, ...]:
        """The names that the key goes by inside its section."""
        return (self.name.rpartition(".")[2], *self.aliases)


# What a key that arrives later says: what is missing and what to do instead.
EXPERT_PARALLEL = (
    "groups of their own for experts arrive in a later version: experts are divided among the ranks of mp_size"
)
QUANTIZATION = (
    "quantization arrives in a later version: leave the key out (or write quant={'enabled': False}) and choose "
    "dtype=torch.bfloat16 or torch.float16 for small weights"
)
OLDER = "this older section is not read: give the path as checkpoint=..."

# Why a key has nothing to do.
EXPERTS = "the experts are read from the model itself"
DESCRIBED = "the model's own config describes its layers"
CONTAINER = (
    "the entry of a training checkpoint that holds the weights is found without it; where there are two, `module_key` "
    "in the description says which"
)
NO_CHECKPOINT = "it only says where a checkpoint lies: `base_dir` does"
PIPELINE = "Gives layers to one process after the other: see parallel.md. A number alone is its pp_size."
SPLIT = "how a layer is divided follows from its heads and widths"
UNQUANTIZED = "it refines `quant`: an error where quantization is asked for, and without meaning where it is not"

KEYS: tuple[Key, ...] = (
    Key("replace_with_kernel_inject", FLAG, True, "works",
        "True, or not given: the backbone is replaced by the fused one. False: nothing is fused, and the engine is a "
        "thin wrapper around the model, cast to `dtype` and moved to `device`; with mp_size its linears are divided. "
        "(DeepSpeed: False.)",
        ("kernel_inject", "replace_with_kernel_injection"),
    ),
    Key("dtype", DTYPE, None, "works",
        "The format of weights and activations: float16, bfloat16 or float32. Not given: the model keeps its own. "
        "(DeepSpeed: float16.) int8 arrives in a later version.",
        permits=COMPUTE, instead=QUANTIZATION,
    ),
    Key("injection_policy", POLICY, None, "works",
        "{LayerClass: policy class} names the family of a model that has no known config; {LayerClass: names of "
        "linears} says how a model that no family describes is divided among processes, and changes no number.",
        ("injection_dict",),
    ),
    Key("max_out_tokens", COUNT, None, "works",
        "The most tokens, input and output together, that one sequence may have in generate(). Not given: no limit "
        "but the model's positions; memory is taken as requests need it. (DeepSpeed: 1024.)",
        ("max_tokens",),
    ),
    Key("min_out_tokens", COUNT, 1, "needless",
        "memory for keys and values is taken as requests need it, so there is no reservation that could turn out too "
        "small; it is only checked not to exceed max_out_tokens",
        ("min_tokens",),
    ),
    Key("enable_cuda_graph", FLAG, None, "works",
        "On a GPU the decode steps of native generation and repeated calls of encoders run as CUDA graphs, which "
        "changes speed and no number, unless this is False. (DeepSpeed: False.)",
    ),
    Key("use_triton", FLAG, False, "needless",
        "every op chooses its implementation by device and shape, and explain() lists the choices; backend='triton' "
        "forces Triton",
    ),
    Key("triton_autotune", FLAG, False, "needless",
        "launch shapes follow from tensor shapes and device, so there is no tuning run",
    ),
    Key("triangular_masking", FLAG, True, "needless",
        "the architecture says whether attention is causal; False for a causal model is an error",
        ("tm",),
    ),
    Key("return_tuple", FLAG, True, "needless",
        "the whole backbone is replaced, not its layers, so no caller sees what a layer returns; the model returns "
        "what it returned before",
    ),
    Key("transposed_mode", FLAG, False, "needless",
        "the layout of weights in memory is chosen by the op that reads them",
    ),
    Key("set_empty_params", FLAG, False, "needless",
        "weights are taken over from the live model one tensor at a time, so no second set is ever allocated",
    ),
    Key("keep_module_on_host", FLAG, False, "works",
        "True: the model stays on the CPU even where there is a GPU; an error together with another `device`.",
    ),
    Key("zero", MAPPING, {}, "needless",
        "inference has no optimizer state to partition; DeepSpeed's engine does not use it either",
    ),
    Key("replace_method", TEXT, "auto", "needless", "there is one method: the backbone is replaced where it sits"),
    Key("local_rank", INTEGER, 0, "needless", "the model runs on the device where it is, or on `device`"),
    Key("module_key", TEXT, "module", "needless", CONTAINER),
    Key("base_dir", PATH, "", "works", "The folder that a relative path in `checkpoint` lies in."),
    Key("checkpoint", CHECKPOINT, None, "works",
        "Fills the model, also one on the meta device, before it is fused: a folder or file of Hugging Face, "
        "DeepSpeed, Megatron-LM, Megatron-Core or torch.distributed.checkpoint, a description of files (a JSON "
        "file or a dict with `type` and `checkpoints`), or a dict of tensors by name.",
    ),
    Key("save_mp_checkpoint_path", PATH, None, "works",
        "An empty or new folder that the weights are written to, as the devices share them, in the dtype they have "
        "after the cast: safetensors and a ds_inference_config.json, which `checkpoint` takes.",
    ),
    Key("checkpoint_config", SECTION, {}, "arrives", OLDER, ("ckpt_config",)),
    Key("checkpoint_config.checkpoint_dir", PATH, None, "arrives", OLDER, permits=()),
    Key("checkpoint_config.save_mp_checkpoint_path", PATH, None, "arrives",
        "this older section is not read: give the path as save_mp_checkpoint_path=...",
        permits=(),
    ),
    Key("checkpoint_config.base_dir", PATH, None, "needless", NO_CHECKPOINT),
    Key("training_mp_size", COUNT, 1, "arrives",
        "how many pieces a checkpoint's weights were trained in is read from the checkpoint: leave the key out",
        permits=(1,),
    ),
    Key("config", ANYTHING, None, "arrives",
        "a second config beside the model's own is not read: " + DESCRIBED +
        "; change that config, or name a family with injection_policy={LayerClass: a subclass of TransformerPolicy}",
        ("args",), permits=({},),
    ),
    Key("injection_policy_tuple", ANYTHING, None, "arrives",
        "it belongs to DeepSpeed's inside: write injection_policy={LayerClass: names}",
        permits=(),
    ),
    Key("quantization_setting", ANYTHING, None, "arrives", QUANTIZATION, permits=()),
    Key("tensor_parallel", SECTION, {}, "works",
        "Divides every layer among several processes, each of which has a device: see parallel.md. A number alone is "
        "its tp_size.",
        ("tp",), shorthand="tp_size",
    ),
    Key("tensor_parallel.enabled", FLAG, True, "needless",
        "it is tp_size that decides; DeepSpeed does not consult it either",
    ),
    Key("tensor_parallel.tp_size", COUNT, 1, "works",
        "How many processes hold the model together. They are the launcher's (hasten run, torchrun), and "
        "torch.distributed is initialised if it is not: NCCL where the model computes on GPUs, else gloo.",
    ),
    Key("tensor_parallel.tp_grain_size", COUNT, 64, "needless", SPLIT),
    Key("tensor_parallel.mpu", MPU, None, "works",
        "A model-parallel unit in Megatron's manner: the processes of its get_model_parallel_group() or "
        "get_tensor_model_parallel_group() hold the model together.",
    ),
    Key("tensor_parallel.tp_group", TP_GROUP, None, "works",
        "The group of torch.distributed whose processes hold the model together.",
    ),
    Key("pipeline_parallel", SECTION, {}, "works", PIPELINE, ("pp",), shorthand="pp_size"),
    Key("pipeline_parallel.pp_size", COUNT, 1, "works", "How many stages there are: tp_size processes hold each."),
    Key("pipeline_parallel.layers", COUNTS, None, "works", "Layers of each stage, where their costs do not decide."),
    Key("pipeline_parallel.pp_group", TP_GROUP, None, "works", "The group of torch.distributed that the stages are."),
    Key("moe", SECTION, {}, "works", "How experts are divided among the ranks of mp_size.", shorthand="enabled"),
    Key("moe.enabled", FLAG, True, "needless", EXPERTS),
    Key("moe.ep_size", COUNT, 1, "works",
        "1, or not given: every rank of mp_size holds a part of each expert. As many as mp_size: every rank holds some "
        "experts whole.",
    ),
    Key("moe.moe_experts", COUNTS, (1,), "needless", EXPERTS, ("num_experts",)),
    Key("moe.type", choice("standard", "residual"), "standard", "arrives",
        "residual experts are not described: a model that has them cannot be accelerated by this version",
        permits=("standard",),
    ),
    Key("moe.ep_mp_group", GROUP, None, "arrives", EXPERT_PARALLEL, permits=(1,)),
    Key("moe.ep_group", GROUP, None, "arrives", EXPERT_PARALLEL, ("expert_group",), permits=(1,)),
    Key("quant", SECTION, {}, "arrives", QUANTIZATION),
    Key("quant.enabled", FLAG, True, "arrives", QUANTIZATION, permits=(False,)),
    *(
        Key(f"quant.{part}{name}", kind, default, "arrives", UNQUANTIZED)
        for part in ("activation", "weight")
        for name, kind, default in (
            ("", SECTION, {}),
            (".enabled", FLAG, True),
            (".num_bits", COUNT, 8),
            (".q_type", choice("symmetric", "asymmetric"), "symmetric"),
            (".q_groups", COUNT, 1),
        )
    ),
    Key("quant.weight.quantized_initialization", MAPPING, {}, "arrives", UNQUANTIZED),
    Key("quant.weight.post_init_quant", MAPPING, {}, "arrives", UNQUANTIZED),
    Key("quant.qkv", SECTION, {}, "arrives", UNQUANTIZED),
    Key("quant.qkv.enabled", FLAG, True, "arrives", UNQUANTIZED),
    Key("mp_size", COUNT, 1, "works", "", moved="tensor_parallel.tp_size"),
    Key("pp_size", COUNT, 1, "works", "The same as `pipeline_parallel.pp_size`.", moved="pipeline_parallel.pp_size"),
    Key("mpu", MPU, None, "works", "", moved="tensor_parallel.mpu"),
    Key("ep_size", COUNT, 1, "works", "", moved="moe.ep_size"),
    Key("ep_group", GROUP, None, "arrives", EXPERT_PARALLEL, ("expert_group",), moved="moe.ep_group"),
    Key("ep_mp_group", GROUP, None, "arrives", EXPERT_PARALLEL, ("expert_mp_group",), moved="moe.ep_mp_group"),
    Key("moe_experts", COUNTS, (1,), "needless", EXPERTS, moved="moe.moe_experts"),
    Key("moe_type", choice("standard", "residual"), "standard", "arrives", EXPERTS, moved="moe.type"),
    Key("certify", CERTIFY, False, "works",
        "True, or an object of settings: the fused model is compared with the original before the engine is handed "
        "out.",
    ),
    Key("keep_originals", FLAG, False, "works",
        "True: the weights as they were are kept beside the cast ones, so that revert() is exact after a change of "
        "dtype.",
    ),
    Key("merge_adapters", FLAG, False, "works",
        "True: PEFT adapters are merged into the weights before the model is fused; a wrapped model is refused "
        "otherwise.",
    ),
    Key("skip_padding", FLAG, False, "works",
        "True: base encoders leave tokens out that attention_mask hides, which saves their time; the last hidden state "
        "is zero there, where transformers gives numbers that nobody should use.",
    ),
    Key("batch_invariant", FLAG, False, "works",
        "True: native generation gives a request the same tokens and log-probabilities, to the bit, whatever else is "
        "in the batch, however its prompt is cut, and whether it was run again. It costs speed, and is an error where "
        "it cannot be kept.",
    ),
    Key("device", DEVICE, None, "works",
        "Where the model runs. Not given: on the GPU it is on, or the current one; where it is if there is none.",
    ),
    Key("backend", NAME, None, "works",
        "The one op backend to use, such as 'reference', instead of the fastest that accepts each call.",
    ),
)  # fmt: skip

SECTIONS: dict[str, dict[str, Key]] = {}
"""For each section ("" is the top), every name that it knows, aliases included, and its key."""
for _key in KEYS:
    for _spelling in _key.spellings:
        SECTIONS.setdefault(_key.section, {})[_spelling] = _key

ELSEWHERE = {
    "profile_model_time": "it is a method: call engine.profile_model_time() after init_inference",
    "model_times": "it is a method: call engine.model_times() after init_inference",
    "fp16": "say dtype=torch.float16",
    "bf16": "say dtype=torch.bfloat16",
}
"""Names that are no keys though users look for them here, with what to do instead."""


def markdown() -> str:
    """KEYS as a Markdown table, in its order."""
    lines = ["| key | value | default | here | what it does |", "|---|---|---|---|---|"]
    for key in KEYS:
        names = f"`{key.name}`" + "".join(f", `{alias}`" for alias in key.aliases)
        works = key.disposition == "works" and key.says
        says = f"Old name of `{key.moved}`." if key.moved and not works else key.says[:1].upper() + key.says[1:]
        says += "" if says.endswith((".", ".)")) else "."
        default = "not given" if key.default is None else f"`{key.default!r}`"
        lines.append(f"| {names} | {key.kind.name} | {default} | {key.disposition} | {says} |")
    return "\n".join(lines) + "\n"
