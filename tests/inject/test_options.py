"""Options.parse: every key of DeepSpeed-Inference and our own, conflicts, sources, and messages."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hasten.errors import ConfigError
from hasten.inject.keys import ELSEWHERE, KEYS, SECTIONS, Key, markdown
from hasten.inject.options import INSIDE, Options
from hasten.module_inject.replace_policy import HFGPT2LayerPolicy

# Transcribed by hand from DeepSpeed 0.19's config classes (inference/config.py) and, below "removed", from the
# signatures of 0.3 to 0.7: path, aliases, default.
DEEPSPEED: list[tuple[str, tuple[str, ...], Any]] = [
    ("replace_with_kernel_inject", ("kernel_inject",), False),
    ("dtype", (), torch.float16),
    ("tensor_parallel", ("tp",), {}),
    ("enable_cuda_graph", (), False),
    ("use_triton", (), False),
    ("triton_autotune", (), False),
    ("zero", (), {}),
    ("triangular_masking", ("tm",), True),
    ("moe", (), {}),
    ("keep_module_on_host", (), False),
    ("quant", (), {}),
    ("checkpoint", (), None),
    ("base_dir", (), ""),
    ("set_empty_params", (), False),
    ("save_mp_checkpoint_path", (), None),
    ("checkpoint_config", ("ckpt_config",), {}),
    ("return_tuple", (), True),
    ("training_mp_size", (), 1),
    ("replace_method", (), "auto"),
    ("injection_policy", ("injection_dict",), None),
    ("injection_policy_tuple", (), None),
    ("config", ("args",), None),
    ("max_out_tokens", ("max_tokens",), 1024),
    ("min_out_tokens", ("min_tokens",), 1),
    ("transposed_mode", (), False),
    ("mp_size", (), 1),
    ("mpu", (), None),
    ("ep_size", (), 1),
    ("ep_group", ("expert_group",), None),
    ("ep_mp_group", ("expert_mp_group",), None),
    ("moe_experts", (), [1]),
    ("moe_type", (), "standard"),
    ("tensor_parallel.enabled", (), True),
    ("tensor_parallel.tp_size", (), 1),
    ("tensor_parallel.tp_grain_size", (), 64),
    ("tensor_parallel.mpu", (), None),
    ("tensor_parallel.tp_group", (), None),
    ("moe.enabled", (), True),
    ("moe.ep_size", (), 1),
    ("moe.moe_experts", ("num_experts",), [1]),
    ("moe.type", (), "standard"),
    ("moe.ep_mp_group", (), None),
    ("moe.ep_group", ("expert_group",), None),
    ("checkpoint_config.checkpoint_dir", (), None),
    ("checkpoint_config.save_mp_checkpoint_path", (), None),
    ("checkpoint_config.base_dir", (), None),
    ("quant.enabled", (), True),
    ("quant.activation", (), {}),
    ("quant.activation.enabled", (), True),
    ("quant.activation.num_bits", (), 8),
    ("quant.activation.q_type", (), "symmetric"),
    ("quant.activation.q_groups", (), 1),
    ("quant.weight", (), {}),
    ("quant.weight.enabled", (), True),
    ("quant.weight.num_bits", (), 8),
    ("quant.weight.q_type", (), "symmetric"),
    ("quant.weight.q_groups", (), 1),
    ("quant.weight.quantized_initialization", (), {}),
    ("quant.weight.post_init_quant", (), {}),
    ("quant.qkv", (), {}),
    ("quant.qkv.enabled", (), True),
    # removed
    ("quantization_setting", (), None),
    ("local_rank", (), 0),
    ("module_key", (), "module"),
]
OURS = {"certify", "keep_originals", "merge_adapters", "skip_padding", "batch_invariant", "device", "backend"}
OURS |= {"pp_size", "pipeline_parallel"} | {f"pipeline_parallel.{n}" for n in ("pp_size", "pp_group", "layers")}
# our default where it is ours
DIFFERENT = {"replace_with_kernel_inject": True, "dtype": None, "max_out_tokens": None, "enable_cuda_graph": None}


class Layer(nn.Module):
    """A layer class to key policies with."""


def group(size: int) -> SimpleNamespace:
    return SimpleNamespace(size=lambda: size)


def mpu(size: int) -> SimpleNamespace:
    return SimpleNamespace(get_model_parallel_world_size=lambda: size)


# A valid value other than the default for each key that holds one, and the field that it becomes if it becomes one.
OTHER: dict[str, Any] = {
    "replace_with_kernel_inject": False,
    "dtype": "bf16",
    "injection_policy": {Layer: HFGPT2LayerPolicy},
    "max_out_tokens": 77,
    "min_out_tokens": 5,
    "enable_cuda_graph": True,
    "use_triton": True,
    "triton_autotune": True,
    "triangular_masking": False,
    "return_tuple": False,
    "transposed_mode": True,
    "set_empty_params": True,
    "keep_module_on_host": True,
    "zero": {"stage": 3},
    "replace_method": "manual",
    "local_rank": -1,
    "module_key": "model",
    "base_dir": "weights",
    "checkpoint": "checkpoints.json",
    "save_mp_checkpoint_path": "out",
    "checkpoint_config.checkpoint_dir": "weights",
    "checkpoint_config.save_mp_checkpoint_path": "out",
    "checkpoint_config.base_dir": "weights",
    "training_mp_size": 2,
    "config": {"hidden_size": 8},
    "injection_policy_tuple": ("output.dense",),
    "quantization_setting": (True, 8),
    "tensor_parallel.enabled": False,
    "tensor_parallel.tp_size": 2,
    "tensor_parallel.tp_grain_size": 1,
    "tensor_parallel.mpu": mpu(2),
    "tensor_parallel.tp_group": group(2),
    "pipeline_parallel.pp_size": 2,
    "pipeline_parallel.layers": (3, 2),
    "pipeline_parallel.pp_group": group(2),
    "moe.enabled": False,
    "moe.ep_size": 2,
    "moe.moe_experts": [4, 8],
    "moe.type": "residual",
    "moe.ep_mp_group": group(2),
    "moe.ep_group": group(2),
    "quant.enabled": True,
    "quant.activation.enabled": True,
    "quant.activation.num_bits": 4,
    "quant.activation.q_type": "asymmetric",
    "quant.activation.q_groups": 2,
    "quant.weight.enabled": True,
    "quant.weight.num_bits": 4,
    "quant.weight.q_type": "asymmetric",
    "quant.weight.q_groups": 2,
    "quant.weight.quantized_initialization": {"num_bits": 8},
    "quant.weight.post_init_quant": {"num_bits": 8},
    "quant.qkv.enabled": True,
    "mp_size": 2,
    "pp_size": 2,
    "mpu": mpu(2),
    "ep_size": 2,
    "ep_group": group(2),
    "ep_mp_group": group(2),
    "moe_experts": 4,
    "moe_type": "residual",
    "certify": {"tolerance": 0.1},
    "keep_originals": True,
    "merge_adapters": True,
    "skip_padding": True,
    "batch_invariant": True,
    "device": "cpu",
    "backend": "reference",
}
FIELDS = set(Options.__dataclass_fields__) - {"notes"}
LEAVES = [key for key in KEYS if key.kind.name != "object"]


def nested(path: str, value: object) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def failure(config: Any = None, **keywords: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Options.parse(config, **keywords)
    return str(caught.value)


# --- the table


@pytest.mark.parametrize(("path", "aliases", "default"), DEEPSPEED, ids=[row[0] for row in DEEPSPEED])
def test_every_key_of_deepspeed_is_known_with_its_aliases_and_default(path, aliases, default):
    [key] = [key for key in KEYS if key.name == path]
    assert set(aliases) <= set(key.aliases)
    wanted = DIFFERENT.get(path, default)
    assert key.default == (tuple(wanted) if isinstance(wanted, list) else wanted)


def test_the_table_holds_deepspeeds_keys_and_ours_and_no_others():
    assert {key.name for key in KEYS} == {row[0] for row in DEEPSPEED} | OURS
    assert len({key.name for key in KEYS}) == len(KEYS)


def test_no_two_keys_of_a_section_share_a_spelling():
    spellings = [(key.section, spelling) for key in KEYS for spelling in key.spellings]
    assert len(set(spellings)) == len(spellings)


BESIDE: dict[str, dict[str, Any]] = {
    "moe.ep_size": {"mp_size": 2},
    "ep_size": {"mp_size": 2},
    "pipeline_parallel.layers": {"pp_size": 2},
}
"""What has to be given beside a value of OTHER."""


def field(key: Key) -> str:
    """The field of Options that the key counts for."""
    return INSIDE.get(key.moved or key.name, key.moved or key.name)


def test_every_key_has_an_example_and_every_working_key_a_field():
    assert set(OTHER) == {key.name for key in LEAVES}
    assert {field(key) for key in LEAVES if key.disposition == "works"} <= FIELDS
    assert {field(key) for key in KEYS} >= FIELDS


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_is_accepted_at_its_default_under_every_spelling(key: Key):
    plain = Options.parse()
    switch = {"enabled": False} if key.name.startswith("quant.") and key.name != "quant.enabled" else {}
    default = False if key.name == "quant.enabled" else key.default
    for spelling in key.spellings:
        config = nested(f"{key.section}.{spelling}" if key.section else spelling, default)
        if switch:
            config["quant"] |= switch
        options = Options.parse(config)
        assert {name: getattr(options, name) for name in FIELDS - {key.name}} == {
            name: getattr(plain, name) for name in FIELDS - {key.name}
        }


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_none_means_not_given_for_every_key(key: Key):
    assert Options.parse(nested(key.name, None)) == Options()


@pytest.mark.parametrize("key", [key for key in LEAVES if key.disposition == "works"], ids=lambda key: key.name)
def test_keys_that_work_arrive_in_the_options_without_a_note(key: Key):
    normal = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    options = Options.parse(nested(key.name, OTHER[key.name]), **BESIDE.get(key.name, {}))
    assert getattr(options, field(key)) == normal.get(key.name, OTHER[key.name])
    assert getattr(options, field(key)) != getattr(Options(), field(key))
    assert options.notes == ()


@pytest.mark.parametrize("key", [key for key in LEAVES if key.disposition == "needless"], ids=lambda key: key.name)
def test_needless_keys_are_accepted_and_explained(key: Key):
    options = Options.parse(nested(key.name, OTHER[key.name]))
    [note] = options.notes
    assert note.startswith(f"{key.name}=") and note.endswith(key.says)


@pytest.mark.parametrize("key", [key for key in LEAVES if key.disposition == "arrives"], ids=lambda key: key.name)
def test_keys_that_arrive_later_are_refused_with_what_to_do_instead(key: Key):
    message = failure(nested(key.name, OTHER[key.name]))
    target = next(other for other in KEYS if other.name == (key.moved or key.name))
    quantization = next(other for other in KEYS if other.name == "quant").says
    assert f"{key.name}=" in message and "not support" in message
    assert (quantization if key.name.startswith("quant.") else target.says) in message


@pytest.mark.parametrize("key", [key for key in KEYS if key.moved], ids=lambda key: key.name)
def test_deprecated_keys_and_their_replacements_agree_or_conflict(key: Key):
    small = {"mpu": mpu(1), "ep_group": group(1), "ep_mp_group": group(1)}
    equal = small.get(key.name, key.default)
    Options.parse(nested(key.moved, equal), **{key.name: equal})
    message = failure(nested(key.moved, equal), **{key.name: OTHER[key.name]})
    assert f"Conflicting argument {key.moved!r}: {key.moved}=" in message
    assert f"and {key.name}=" in message


# --- values


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        *((name, torch.float16) for name in ("torch.float16", "fp16", "float16", "half", "torch.half", torch.half)),
        *((name, torch.float32) for name in ("torch.float32", "fp32", "float32", "float", "torch.float", torch.float)),
        *((name, torch.bfloat16) for name in ("torch.bfloat16", "bf16", "bfloat16", "bfloat", torch.bfloat16)),
    ],
)
def test_dtypes_are_read_in_all_their_spellings(spelling, dtype):
    assert Options.parse(dtype=spelling).dtype is dtype


def test_without_a_dtype_the_model_keeps_its_own():
    assert Options.parse().dtype is None
    assert Options.parse({"dtype": None}).dtype is None


@pytest.mark.parametrize("dtype", [torch.int8, "int8", "torch.int8"])
def test_int8_is_refused_with_what_to_do_instead(dtype):
    message = failure(dtype=dtype)
    assert "not supported by this version" in message and "dtype=torch.bfloat16" in message


@pytest.mark.parametrize("dtype", ["fp8", "FP16", 16, torch.int32, float, True, ["fp16"]])
def test_unknown_dtypes_are_refused_with_the_known_names(dtype):
    message = failure(dtype=dtype)
    assert "dtype=" in message and "bfloat16" in message and "torch.half" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("mp_size", True, "an integer of at least 1"),
        ("mp_size", 1.0, "an integer of at least 1"),
        ("mp_size", "1", "an integer of at least 1"),
        ("max_out_tokens", 0, "an integer of at least 1"),
        ("max_out_tokens", -5, "an integer of at least 1"),
        ("max_tokens", True, "an integer of at least 1"),
        ("min_out_tokens", 0, "an integer of at least 1"),
        ("local_rank", "0", "an integer"),
        ("moe_experts", [], "an integer of at least 1 or a list of such"),
        ("moe_experts", [4, True], "an integer of at least 1 or a list of such"),
        ("enable_cuda_graph", 1, "True or False"),
        ("enable_cuda_graph", "true", "True or False"),
        ("replace_method", 3, "a string"),
        ("base_dir", 3, "a path"),
        ("zero", [], "an object (dict)"),
        ("tensor_parallel", "2", "an object (dict)"),
        ("quant", True, "an object (dict)"),
        ("moe", 2, "an object (dict)"),
        ("moe_type", "dense", "one of 'standard', 'residual'"),
        ("certify", "yes", "True, False or an object (dict)"),
        ("backend", "", "a non-empty string"),
        ("device", 0, "a torch.device or its name"),
        ("device", "toaster", "a torch.device or its name"),
        ("device", "meta", "the meta device holds no data"),
        ("mpu", object(), "a model-parallel unit with get_model_parallel_world_size()"),
        ("ep_group", "world", "a torch.distributed process group"),
        ("injection_policy", "GPT2Block", "a dict of {layer class: policy class"),
        ("injection_policy", {"GPT2Block": HFGPT2LayerPolicy}, "'GPT2Block' is not a subclass of torch.nn.Module"),
        ("injection_policy", {int: HFGPT2LayerPolicy}, "<class 'int'> is not a subclass of torch.nn.Module"),
        ("injection_policy", {Layer: nn.Linear}, "neither a policy class of hasten.module_inject.replace_policy"),
        ("injection_policy", {Layer: ()}, "nor names of linears"),
        ("injection_policy", {Layer: ("a", 3)}, "nor names of linears"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(key, value, expected):
    message = failure(**{key: value})
    assert f"{key}=" in message and "(keyword argument): expected " in message and expected in message


def test_an_mpu_that_is_not_initialized_says_so():
    def uninitialized() -> int:
        raise AssertionError("model parallel group is not initialized")

    message = failure(mpu=SimpleNamespace(get_model_parallel_world_size=uninitialized))
    assert "get_model_parallel_world_size() failed: model parallel group is not initialized" in message


def test_groups_that_hold_the_model_agree_on_their_size():
    one, two = mpu(1), mpu(2)
    Options.parse(mpu=one, tp={"mpu": one, "tp_group": group(1)}, moe={"ep_group": group(1)})
    assert Options.parse(mp_size=2, mpu=two, ep_size=2).mpu is two
    assert "tensor_parallel.tp_size has 4" in failure(tp={"tp_size": 4, "tp_group": group(2)})
    assert "mp_size has 1 (keyword argument) and mpu has 2 (keyword argument)" in failure(mp_size=1, mpu=two)
    assert "must be 1 or the number of processes" in failure(ep_size=2)
    assert "groups of their own for experts arrive" in failure(ep_group=group(2))


def test_stages_are_counted_apart_from_the_ranks_that_divide_a_layer():
    both = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: 2, get_pipeline_model_parallel_world_size=lambda: 3
    )
    assert Options.parse(mpu=both, mp_size=2, pp_size=3, pipeline_parallel={"pp_group": group(3)}).pp_size == 3
    assert Options.parse(mpu=mpu(2), pp_size=3).pp_size == 3  # the unit knows of no stages
    assert "pp_size has 2 (keyword argument) and mpu has 3 (keyword argument)" in failure(mpu=both, pp_size=2)
    assert "counts the layers of 3 stages, and pp_size is 2" in failure(pp={"pp_size": 2, "layers": [1, 2, 3]})
    assert Options.parse(pp_size=2, batch_invariant=True).batch_invariant
    assert "divided among 2 processes" in failure(pp_size=2, kernel_inject=False)


def test_a_number_stands_for_a_sections_size():
    assert Options.parse(tp=4).tp_size == Options.parse({"tensor_parallel": 4}, mp_size=4).tp_size == 4
    assert "expected an integer of at least 1" in failure(tensor_parallel=0)
    assert "expected an object" in failure(tensor_parallel=True)


def test_numpy_integers_are_integers():
    import numpy

    assert Options.parse(max_out_tokens=numpy.int64(12)).max_out_tokens == 12


def test_the_device_may_be_a_torch_device():
    assert Options.parse(device=torch.device("cpu")).device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_this_machine_lacks_is_refused():
    assert "of this machine (torch says: " in failure(device="cuda:0")


@pytest.mark.parametrize("moe", [True, False, {"enabled": True}, {}])
def test_moe_may_be_a_bool_or_an_object(moe):
    Options.parse(moe=moe)


@pytest.mark.parametrize(
    "quant",
    [
        {},
        {"enabled": False},
        {"enabled": False, "weight": {"enabled": True, "num_bits": 4}},
        {"weight": {"enabled": False, "num_bits": 4}, "qkv": {"enabled": False}},
    ],
)
def test_quant_that_is_switched_off_is_accepted(quant):
    Options.parse(quant=quant)


@pytest.mark.parametrize(
    "quant",
    [
        {"enabled": True},
        {"enabled": True, "weight": {"num_bits": 8}},
        {"enabled": True, "weight": {"enabled": False}},
        {"weight": {"num_bits": 8}},
        {"weight": {"enabled": False}, "activation": {"num_bits": 8}},
    ],
)
def test_quant_that_asks_for_quantization_is_refused(quant):
    assert "quantization arrives in a later version" in failure(quant=quant)


@pytest.mark.parametrize("value", [{}, None])
def test_an_empty_second_config_is_accepted(value):
    Options.parse({"config": value}, args=value)


# --- contradictions


def test_the_minimum_of_tokens_is_at_most_the_maximum():
    assert Options.parse(min_tokens=8, max_tokens=8).min_out_tokens == 8
    assert "exceeds max_out_tokens=8" in failure({"max_out_tokens": 8}, min_out_tokens=9)


def test_keeping_the_module_on_the_host_contradicts_another_device(monkeypatch):
    Options.parse(keep_module_on_host=True, device="cpu")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # stands in for a machine with a GPU
    assert "keep_module_on_host=True (keyword argument) contradicts device='cuda'" in failure(
        keep_module_on_host=True, device="cuda"
    )
    assert Options.parse(keep_module_on_host=False, device="cuda").device == torch.device("cuda")


def test_forbidding_fusion_contradicts_a_policy_class_but_not_names():
    policy = {Layer: ("output.dense",)}
    assert Options.parse(replace_with_kernel_inject=False, injection_policy=policy).injection_policy == policy
    message = failure(kernel_inject=False, injection_policy={Layer: HFGPT2LayerPolicy})
    assert "kernel_inject=False" in message and "HFGPT2LayerPolicy" in message


def test_masking_is_refused_only_where_it_contradicts_the_architecture():
    for options in (Options(), Options.parse(triangular_masking=True)):
        options.check_masking(causal=True)
        options.check_masking(causal=False)
    Options.parse(tm=False).check_masking(causal=False)
    with pytest.raises(ConfigError, match="triangular_masking=False"):
        Options.parse(tm=False).check_masking(causal=True)


# --- two sources


def test_equal_values_in_config_and_keywords_are_fine_after_normalization():
    options = Options.parse({"dtype": "fp32", "mp_size": 1, "max_tokens": 9}, dtype=torch.float32, max_out_tokens=9)
    assert options.dtype is torch.float32 and options.max_out_tokens == 9


def test_different_values_in_config_and_keywords_name_both_places():
    message = failure({"dtype": "fp32"}, dtype=torch.float16)
    assert "Conflicting argument 'dtype': dtype='fp32' (config dict) and dtype=torch.float16 (keyword" in message


def test_a_value_that_conflicts_and_is_not_supported_is_told_both():
    message = failure({"dtype": "fp32"}, dtype="int8")
    assert (
        "2 problems" in message
        and "Conflicting" in message
        and "dtype='int8' (keyword argument) is not supp" in message
    )


def test_a_name_and_its_alias_in_one_dict_agree_or_conflict():
    assert Options.parse({"max_out_tokens": 9, "max_tokens": 9}).max_out_tokens == 9
    message = failure({"max_out_tokens": 9, "max_tokens": 8})
    assert "Conflicting argument 'max_out_tokens': max_out_tokens=9 (config dict) and max_tokens=8" in message


def test_sections_of_config_and_keywords_are_merged_key_by_key():
    Options.parse({"tp": {"tp_size": 1}}, tensor_parallel={"enabled": True})
    assert "Conflicting argument 'tensor_parallel.tp_grain_size'" in failure(
        {"tp": {"tp_grain_size": 1}}, tensor_parallel={"tp_grain_size": 2}
    )


def test_values_that_cannot_be_compared_conflict_instead_of_crashing():
    import numpy

    zeros = {"checkpoint": numpy.zeros(3)}
    assert "Conflicting argument 'checkpoint'" in failure(zeros, checkpoint=numpy.zeros(3))
    assert Options.parse(zeros, **zeros).checkpoint is zeros["checkpoint"]


def test_the_users_dicts_are_never_changed():
    config = {"tp": {"tp_size": 1}, "dtype": "fp16", "moe": {"ep_size": 1}, "certify": {"x": [1]}, "zero": {"stage": 0}}
    keywords = {"quant": {"enabled": False}, "max_tokens": 5, "injection_policy": {Layer: "a.b"}}
    before = copy.deepcopy(config), {**keywords, "injection_policy": {**keywords["injection_policy"]}}
    options = Options.parse(config, **keywords)
    assert (config, keywords) == before
    assert options.injection_policy == {Layer: ("a.b",)}
    assert options.injection_policy is not keywords["injection_policy"] and options.certify is not config["certify"]


def test_options_cannot_be_changed():
    with pytest.raises(AttributeError):
        Options().dtype = torch.float16  # type: ignore[misc]


def test_no_arguments_give_the_defaults():
    assert Options.parse() == Options.parse({}) == Options()


def test_all_problems_are_reported_at_once():
    message = failure({"dtyp": "fp16", "tp": {"tp_sise": 1}}, mp_size=0, max_tokens=0, dtype="fp7", moe=3)
    assert "6 problems" in message
    for part in ("'dtyp' (config dict)", "'tensor_parallel.tp_sise'", "mp_size=0", "max_tokens=0", "'fp7'", "moe=3"):
        assert part in message


# --- JSON files


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_a_config_file_is_read(tmp_path, kind):
    content = {"dtype": "fp16", "tensor_parallel": {"tp_size": 1}, "max_out_tokens": 64, "replace_method": "auto"}
    path = written(tmp_path / "inference.json", json.dumps(content))
    assert Options.parse(kind(path), replace_with_kernel_inject=True) == Options.parse(content)


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    assert Options.parse(written(tmp_path / "c.json", b'\xef\xbb\xbf{"max_tokens": 3}')).max_out_tokens == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON: Expecting property name"),
        ("", "is not JSON: Expecting value"),
        ("dtype: fp16", "is not JSON: Expecting value"),
        (b"\xff\xfe\x00", "is not JSON: 'utf-8' codec"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "must hold a JSON object, not [1, 2]"),
        ("null", "must hold a JSON object, not None"),
        ('{"dtyp": "fp16"}', "unknown key 'dtyp' (config file "),
        ('{"mp_size": 1, "mp_size": 2}', "key 'mp_size' appears 2 times in one object"),
        ('{"tp": {"tp_size": 2, "tp_size": 1}}', "key 'tp_size' appears 2 times in one object"),
        ('{"max_out_tokens": 1e3}', "max_out_tokens=1000.0 (config file "),
    ],
)
def test_a_bad_config_file_says_what_is_wrong_and_where(tmp_path, content, message):
    path = written(tmp_path / "c.json", content)
    text = failure(path)
    assert message in text and repr(str(path)) in text


def test_a_missing_or_unreadable_config_file_says_so(tmp_path):
    assert "cannot be read: No such file" in failure(str(tmp_path / "nothing.json"))
    assert "cannot be read: Is a directory" in failure(tmp_path)


@pytest.mark.parametrize("config", [3, ["dtype"], b"c.json", object(), True])
def test_a_config_of_another_type_is_refused(config):
    assert "config must be a dict, the path of a JSON file or None" in failure(config)


# --- unknown keys


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"dtyp": "fp16"}, "did you mean 'dtype'?"),
        ({"kernel_injection": True}, "did you mean 'kernel_inject'?"),
        ({"tp_size": 2}, "did you mean 'tensor_parallel.tp_size'?"),
        ({"tensor_parallel.tp_size": 2}, "did you mean 'tensor_parallel'?"),
        ({"tp": {"size": 2}}, "'tensor_parallel.size' (config dict); did you mean 'tp_size'?"),
        ({"tp": {"mp_size": 2}}, "did you mean 'mp_size'?"),
        ({"quant": {"weight": {"bits": 4}}}, "'quant.weight.bits' (config dict); did you mean 'num_bits'?"),
        ({"moe": {"zzz": 4}}, "known here: enabled, ep_size"),
        ({3: 4}, "unknown key '3'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(config, wanted):
    assert wanted in failure(config)


@pytest.mark.parametrize(("name", "advice"), ELSEWHERE.items())
def test_a_name_that_belongs_elsewhere_says_where(name, advice):
    assert name not in SECTIONS[""]
    assert advice in failure(**{name: True})


def test_the_old_spelling_of_kernel_injection_is_understood():
    assert not Options.parse(replace_with_kernel_injection=False).replace_with_kernel_inject


@given(st.text(max_size=20).filter(lambda name: name not in SECTIONS[""]), st.none() | st.integers())
def test_any_unknown_key_is_refused_by_name_from_either_source(name, value):
    assert f"unknown key {name!r} (config dict)" in failure({name: value})
    if name != "config":
        assert f"unknown key {name!r} (keyword argument)" in failure(None, **{name: value})


@given(st.sampled_from([section for section in SECTIONS if section]), st.text(max_size=20), st.booleans())
def test_any_unknown_key_inside_a_section_is_refused_by_path(section, name, value):
    if name not in SECTIONS[section]:
        assert f"unknown key {f'{section}.{name}'!r} (config dict)" in failure(nested(section, {name: value}))


@given(st.sampled_from([key.name for key in KEYS if not key.section and len(key.name) > 4]), st.data())
def test_one_dropped_letter_still_finds_the_key(name, data):
    at = data.draw(st.integers(0, len(name) - 1))
    typo = name[:at] + name[at + 1 :]
    if typo not in SECTIONS[""]:
        assert "did you mean" in failure({typo: None})


# --- the page


def test_the_page_for_deepspeed_users_holds_the_table():
    page = Path(__file__).parents[2] / "docs" / "deepspeed.md"
    start, end = "<!-- keys: begin -->\n", "<!-- keys: end -->"
    table = page.read_text(encoding="utf-8").partition(start)[2].partition(end)[0]
    assert table == markdown(), "write hasten.inject.keys.markdown() between the two keys comments of docs/deepspeed.md"
